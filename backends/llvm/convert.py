"""stand-in"""
from llvmlite import ir
from .values import register_type, chunk_type, width_of
def _c(x, n):
    t = x.type
    return ir.Constant(t, [n]*t.count if isinstance(t, ir.VectorType) else n)
def emit_cast(b, x, src, dst, features=frozenset()):
    if src == dst: return x
    w = width_of(x)
    t = lambda d: chunk_type(register_type(d), w)
    i = lambda n: chunk_type(ir.IntType(n), w)
    f = chunk_type(ir.FloatType(), w)
    if src.name == "bf16":
        x = b.bitcast(b.shl(b.zext(x, i(32)), _c(b.zext(x, i(32)), 16)), f); 
        from ...ir.types import DTYPES
        return emit_cast(b, x, DTYPES["f32"], dst, features)
    if dst.name == "bf16":
        from ...ir.types import DTYPES
        x = emit_cast(b, x, src, DTYPES["f32"], features)
        u = b.bitcast(x, i(32))
        r = b.add(u, b.add(_c(u, 0x7fff), b.and_(b.lshr(u, _c(u, 16)), _c(u, 1))))
        r = b.trunc(b.lshr(r, _c(u,16)), i(16))
        return b.select(b.fcmp_unordered("uno", x, x), _c(r, 0x7fc0), r)
    if src.is_float and dst.is_float:
        return b.fpext(x, t(dst)) if dst.bits > src.bits else b.fptrunc(x, t(dst))
    if dst.kind == "bool":
        return b.fcmp_unordered("!=", x, _c(x, 0.0)) if src.is_float else b.icmp_unsigned("!=", x, _c(x, 0))
    if src.is_float:
        return b.fptosi(x, t(dst)) if dst.is_signed else b.fptoui(x, t(dst))
    if dst.is_float:
        return b.sitofp(x, t(dst)) if src.is_signed else b.uitofp(x, t(dst))
    if src.kind == "bool": return b.zext(x, t(dst))
    if dst.bits < src.bits: return b.trunc(x, t(dst))
    if dst.bits == src.bits: return x
    return b.sext(x, t(dst)) if src.is_signed else b.zext(x, t(dst))
