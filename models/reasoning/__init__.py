"""A language model writing step by step, as a program that a particle filter runs.

    from smcscale.models.reasoning import solve
    solve("Ana has 14 apples. ...").answer

| name | what it is |
|---|---|
| `solve`, `Solution` | question in, answer out |
| `reason`, `read_prompt` | the NumPyro program, and a prompt read once for it |
| `difference`, `product`, `odds`, `odds_ratio`, `Potential` | potentials from scores |
| `LanguageModel`, `ProcessRewardModel` | what writes and what judges |
| `weighted_majority`, `majority`, `argmax`, `sample` | one answer from weighted answers |

| module | idea |
|---|---|
| `methods` | the published population methods as settings of the filter |
| `answers`, `stopping` | one answer from many; when to stop |
| `potentials`, `aggregates` | what is weighed, and of which scores |
| `rewards`, `reward_forms` | other rewards than a trained model; forms of trained ones |
| `constraints`, `automaton`, `regex`, `schema` | texts that obey a pattern, a token a step |
| `predicates`, `awrs` | texts that a Python predicate accepts, likewise |
| `host_program`, `judging` | `reason` with a judge in plain Python |
| `remote`, `remote_program`, `server` | models behind an OpenAI-compatible server |
| `gguf_folder`, `smollm2` | GGUF files as model folders; a small pretrained model by pip |
| `beds`, `mazes`, `countdown`, `known_model` | models whose every probability is known, and tasks with exact answers on them |
| `evidence_signal`, `equations` | does the evidence know who is right; a judge of equations |
| `tree`, `grow`, `pictures` | a run as one tree of its texts; pictures |
| `tree_search`, `phi_decoding` | searches with a tree of their own |
| `scaling`, `budget` | accuracy against budget: laws; cost, plans, what a run spent |
| `bench`, `report` | many problems and methods in one file; accuracy with intervals, tests, picture |
| `sampling`, `chat` | the law of a token; chat templates |

Problems and grader are in `tasks.py`; `python -m smcscale.models.reasoning.train` remakes the
shipped models.
"""

from smcscale.models.reasoning.answers import argmax as argmax
from smcscale.models.reasoning.answers import majority as majority
from smcscale.models.reasoning.answers import sample as sample
from smcscale.models.reasoning.answers import weighted_majority as weighted_majority
from smcscale.models.reasoning.language_model import LanguageModel as LanguageModel
from smcscale.models.reasoning.language_model import TextState as TextState
from smcscale.models.reasoning.potentials import Potential as Potential
from smcscale.models.reasoning.potentials import difference as difference
from smcscale.models.reasoning.potentials import odds as odds
from smcscale.models.reasoning.potentials import odds_ratio as odds_ratio
from smcscale.models.reasoning.potentials import product as product
from smcscale.models.reasoning.program import read_prompt as read_prompt
from smcscale.models.reasoning.program import reason as reason
from smcscale.models.reasoning.reward_model import ProcessRewardModel as ProcessRewardModel
from smcscale.models.reasoning.solve import Solution as Solution
from smcscale.models.reasoning.solve import solve as solve
