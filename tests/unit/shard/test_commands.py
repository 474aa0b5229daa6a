"""`aicc shard` and `aicc sim` as a user runs them."""

import json
from pathlib import Path

import pytest
from aicc.compiler.cli import app
from aicc.passes.shard import load_plan, load_plan_file
from typer.testing import CliRunner

CONFIG = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
          "intermediate_size": 8192, "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False}
MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
                                     intermediate_size=8192, vocab_size=32000, max_position_embeddings=2048))
example_inputs = (torch.zeros(1, 1024, dtype=torch.long),)
"""
PLAIN = """
import torch
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4096, 16384), torch.nn.Linear(16384, 4096)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(12))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
model = Net()
example_inputs = (torch.zeros(64, 4096),)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def aicc(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: object) -> str:
    result = aicc(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*arguments: object) -> str:
    result = aicc(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_plan_of_a_configuration(config, tmp_path):
    plan = tmp_path / "plan.toml"
    text = good("shard", config, "--mesh", "2x8", "--hardware", "h100-sxm", "--global-batch", 256, "-o", plan)
    for word in ("MFU", "HFU", "tokens/s", "peak memory", "lower bound", "DDP", "FSDP (ZeRO-3)", "Megatron TP8 x PP", "exposed communication"):
        assert word in text
    found = load_plan_file(plan)
    assert found.plan == load_plan(plan)
    assert found.plan.devices == 16 and found.target.global_batch == 256 and found.model.layers == 16
    assert "version = 1" in plan.read_text()


def test_json_and_pins(config):
    table = json.loads(good("shard", config, "--mesh", "1x8", "--global-batch", 64, "--fix", "tp=4,zero=1", "--no-by-hand", "--json"))
    assert (table["best"]["plan"]["tp"], table["best"]["plan"]["zero"]) == (4, 1)
    assert table["search"]["proved"] and 0 <= table["search"]["gap"] < 1
    assert table["best"]["mfu"] <= table["best"]["hfu"]


def test_module_on_the_meta_device_with_the_integer_program(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    text = good("shard", tmp_path / "model.py", "--mesh", "1x8", "--global-batch", 64)
    assert "sequence 1024" in text
    assert "o_proj rows" in text and "q_proj columns" in text and "down_proj rows" in text


def test_module_without_a_configuration(tmp_path):
    (tmp_path / "net.py").write_text(PLAIN)
    text = good("shard", tmp_path / "net.py", "--mesh", "1x8", "--global-batch", 4096)
    assert "12 layers" in text and "up columns, down rows" in text
    plan = tmp_path / "plan.toml"
    text = good("shard", tmp_path / "net.py", "--mesh", "1x8", "--global-batch", 4096, "--fix", "tp=4,pp=2", "--why", "layer.7.down", "-o", plan)
    assert "weight: rows over tp 4" in text and "all_reduce" in text
    assert "did you mean 'down.linear'" in bad("shard", tmp_path / "net.py", "--mesh", "1x8", "--global-batch", 4096, "--why", "layer.7.dwn")
    assert "rank    1 |" in good("sim", "run", plan, "--scale", "off")


def test_edited_plan_is_taken_back(config, tmp_path):
    plan = tmp_path / "plan.toml"
    good("shard", config, "--mesh", "1x8", "--global-batch", 64, "--fix", "dp=8", "--no-by-hand", "-o", plan)
    edited = tmp_path / "edited.toml"
    edited.write_text(plan.read_text().replace("micro_batch = ", "micro_batch = 1 #", 1))
    assert "dp8" in good("sim", "run", edited, "--scale", "off")
    good("shard", config, "--mesh", "1x8", "--global-batch", 64, "--plan", edited, "--no-by-hand")
    assert "step" in good("shard", "--diff", plan, edited)
    edited.write_text(plan.read_text().replace("zero = ", "zero = 7 #", 1))
    assert "edited.toml:" in bad("shard", config, "--mesh", "1x8", "--plan", edited)
    assert "= 8 devices, the mesh has 16" in bad("shard", config, "--mesh", "2x8", "--global-batch", 64, "--plan", plan)
    (tmp_path / "v9.toml").write_text("version = 9\ntp = 2\n")
    assert "v9.toml:1: version = 9: this aicc reads plan files of version 1" in bad("sim", "run", tmp_path / "v9.toml")


def test_why(config):
    text = good("shard", config, "--mesh", "1x8", "--global-batch", 64, "--fix", "tp=8,sp=true", "--why", "layer.7.mlp.down", "--why", "lm_head")
    assert "mlp_down of layer 7" in text and "rows (the contraction)" in text and "reduce_scatter" in text and "logits of head" in text
    assert "tp=4" in text
    assert "layers 0 to 15" in bad("shard", config, "--mesh", "1x8", "--why", "layer.99.mlp.down")
    assert "did you mean" in bad("shard", config, "--mesh", "1x8", "--why", "layer.1.mlp_dwn")


def test_why_not_and_pareto(config):
    text = good("shard", config, "--mesh", "1x8", "--global-batch", 64, "--why-not", "tp=8", "--pareto")
    assert "tp=8" in text and "Time against memory" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (("--mesh", "2y8"), "--mesh: mesh '2y8': '2y8' is not an extent"), (("--mesh", "0x8"), "is not an extent"),
    (("--mesh", "2x16"), "16 devices per node, but a node of h100-sxm has 8"), (("--hardware", "h100-smx"), "did you mean 'h100-sxm'"),
    (("--global-batch", "-3"), "--global-batch = -3: must be at least 0"), (("--fix", "tq=2"), "'tq=2': write field=value; did you mean"),
    (("--dtype", "bf17"), "no peak FLOP/s for dtype 'bf17'; did you mean 'bf16'"), (("--mesh", "1x8", "--fix", "tp=3"), "with tp=3"),
    (("--mesh", "1x8", "--memory-limit", "4"), "does not fit on 8 x H100-SXM5-80GB under any plan: the smallest found needs"),
])
def test_mistakes(config, arguments, message):
    assert message in bad("shard", config, *arguments)


def test_mistakes_in_files(config, tmp_path):
    from aicc.passes.shard.cluster import PRESETS
    cluster = tmp_path / "lab.toml"
    cluster.write_text((PRESETS / "h100-sxm.toml").read_text().replace("bandwidth = 450e9", "bandwidth = -450e9"))
    line = next(i for i, text in enumerate(cluster.read_text().splitlines(), 1) if "-450e9" in text)
    assert f"lab.toml:{line}: levels[0].bandwidth = -450000000000.0: must be a positive number" in bad("shard", config, "--hardware", cluster)
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json:1: not JSON" in bad("shard", tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"width": 3}')
    assert "hidden_size, n_embd, d_model" in bad("shard", tmp_path / "other.json")
    assert "no file" in bad("shard", tmp_path / "absent.py")
    assert "which model?" in bad("shard")


def test_sim_validate(tmp_path):
    from aicc.passes.shard.published import PUBLISHED
    text = good("sim", "validate")
    assert "held out: 13 of 18 rows, median |error| 1.4%, worst 12.1%" in text and "fitted" in text and "kernel_overhead_s" in text
    rows = json.loads(good("sim", "validate", "--json"))["rows"]
    assert len(rows) == 18 and {r["fitted"] for r in rows} == {True, False}
    copy = tmp_path / "one.json"
    runs = json.loads(PUBLISHED.read_text())
    copy.write_text(json.dumps({"runs": runs["runs"][:2]}))
    assert len(json.loads(good("sim", "validate", copy, "--json"))["rows"]) == 2
    copy.write_text('{"runs": [{"model": "x"}]}')
    assert "runs[0] (x): 'layers' is missing" in bad("sim", "validate", copy)


def test_sim_run(config, tmp_path):
    plan = tmp_path / "plan.toml"
    good("shard", config, "--mesh", "4x8", "--global-batch", 256, "--fix", "pp=4,tp=2,schedule=1f1b", "--no-by-hand", "-o", plan)
    text = good("sim", "run", plan, "--scale", "32,64,2048", "--jitter", 0.05, "--straggler", 1.5, "--mtbf", 100, "--lose", 1)
    for word in ("rank    0 |FFFF", "with stragglers", "goodput", "without 1 of 4 nodes", "2048", "linearity"):
        assert word in text, word
    table = json.loads(good("sim", "run", plan, "--scale", "32,64,2048", "--straggler", 1.5, "--json"))
    assert [row["devices"] for row in table["scaling"]] == [32, 64, 2048]
    assert table["straggler_step_s"] > table["step_s"]
    assert "--scale: 'x' is not a number of devices" in bad("sim", "run", plan, "--scale", "x")
    assert "--straggler = 0.5: must be at least 1" in bad("sim", "run", plan, "--straggler", 0.5)
