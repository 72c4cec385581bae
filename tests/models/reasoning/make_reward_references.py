"""Write `reward_references.safetensors`: scores of reward models in torch, for the parity tests.

    python tests/models/reasoning/make_reward_references.py      needs torch and transformers

One random model for each form (weights, heads) and its scores of one solution, in float32.  No
network is used.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from support.reasoning import rewards


def main() -> None:
    tensors: dict[str, np.ndarray] = {}
    for index, (name, case) in enumerate(rewards.CASES.items()):
        _, weights, score = rewards.torch_model(case, index)
        tensors |= {f"{name}/{key}": np.ascontiguousarray(x) for key, x in weights.items()}
        found = [score(text) for text in rewards.texts(name)]
        tensors[f"{name}/scores"] = np.array(found, np.float32)
        print(name, np.round(found, 3))
    save_file(tensors, str(HERE / "reward_references.safetensors"))


if __name__ == "__main__":
    main()
