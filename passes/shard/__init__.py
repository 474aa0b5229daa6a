"""Auto-parallelism: how a model should run on a mesh, and how fast it will. No tensors, no devices needed.

    cluster = load_cluster("h100-sxm", mesh=Mesh.parse("2x8"))
    model = from_transformers(config, seq=8192)
    result = search(Problem(model, cluster, global_batch=512))
    print(why(result)); open("plan.toml", "w").write(result.plan.to_toml())

Facts: `load_cluster`, `Mesh`, `ModelConfig`, `from_transformers`. Prediction: `predict_step` (one plan), `simulate` (one
pipeline schedule). Search: `search`, `pareto`, pins by `Space.pin`. Explanation: `why`, `why_not`, `diff`, `by_hand`.
Files: `load_plan_file`, `PlanFile`. Truth: `validate` against published runs (module `published`), `calibrate` fits. docs/planner.md
says how it all works.
"""

from .cluster import Cluster, Mesh, load_cluster, preset_names
from .explain import by_hand, diff, why, why_not
from .explain_op import why_op
from .layer_cost import SOFTWARE, Software
from .model import MixtureOfExperts, ModelConfig, from_transformers
from .plan import SCHEMA, Plan, load_plan, parse_plan, plan_problems
from .plan_file import PlanFile, Target, load_plan_file
from .planner import Infeasible, Problem, SearchResult, pareto, search
from .published import format_report, validate
from .schedules import build_schedule
from .simulator import PipelineCosts, simulate
from .space import Space, parse_pins
from .step import StepReport, predict_step
from .tables import ConfigError

__all__ = [
    "SCHEMA", "SOFTWARE", "Cluster", "ConfigError", "Infeasible", "Mesh", "MixtureOfExperts", "ModelConfig",
    "PipelineCosts", "Plan", "PlanFile", "Problem", "SearchResult", "Software", "Space", "StepReport", "Target",
    "build_schedule", "by_hand", "diff", "format_report", "from_transformers", "load_cluster", "load_plan",
    "load_plan_file", "pareto", "parse_pins", "parse_plan", "plan_problems", "predict_step", "preset_names", "search",
    "simulate", "validate", "why", "why_not", "why_op",
]
