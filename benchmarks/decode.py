"""How fast are particles decoded, against `transformers.generate` on the same weights?

    python benchmarks/decode.py [--model FOLDER] [--particles 1 4 16] [--tokens 96] [--repeats 7] [--quick]

Each writes exactly so many tokens for N texts of one prompt, drawn at temperature 1 with nothing cut off, in
float32: reading the prompt included, compiling not. One repeat asks each in turn, on the same cores; a ratio is
of one repeat, so that a slow moment of the machine cancels. Besides, of our decoder: FLOPs and bytes that a
token-step needs, memory of the particles with the prompt's keys and values stored once or in each particle, and
compilations when the prompt changes inside its size. The shipped model, and SmolLM2-135M where
`python -m smcscale get smollm2` was run, unless `--model` names others. Writes `benchmarks/results/decode.json`.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from provenance import made_with

from smcscale.models.reasoning.budget import decode_cost, num_parameters, token_step
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.smollm2 import smollm2_folder
from smcscale.models.reasoning.solve import shipped

RESULT = Path(__file__).resolve().parent / "results" / "decode.json"
PROMPT = "Ana has 35 books. Ana buys 14 more books. How many books does Ana have now?\n"
OTHER = "Tom has 12 books. Tom loses 5 books. How many books does Tom have now? Think.\n"


def endless(folder: Path, place: Path) -> Path:
    """The model's folder without end tokens, so that all texts get as long as is asked."""
    made = place / folder.name
    shutil.copytree(folder, made)
    (made / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return made


@eqx.filter_jit
def _write(lm: LanguageModel, keys: jax.Array):
    """One long step of N texts."""
    start = lm.start()
    return jax.vmap(lambda key: lm.next_step(start).sample(key))(keys)


def ours(lm: LanguageModel, n: int, tokens: int):
    """`run(seed)` writes N texts after the prompt."""

    def run(seed: int, prompt: str = PROMPT):
        keys = jax.random.split(jax.random.key(seed), n)
        texts = jax.block_until_ready(_write(lm.given(prompt), keys))
        assert (np.asarray(texts.written.length) == tokens).all()
        return texts

    return run


def theirs(folder: Path, n: int, tokens: int):
    """The same by `transformers`."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    network, ids = network.to(place), torch.tensor([tokenizer(PROMPT).input_ids], device=place)

    def run(seed: int):
        torch.manual_seed(seed)
        with torch.inference_mode():
            texts = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, num_return_sequences=n, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        assert texts.cpu().shape == (n, ids.shape[1] + tokens)  # and waits for the device

    return run


def seconds(run, seed: int) -> float:
    """Of one call."""
    started = time.perf_counter()
    run(seed)
    return time.perf_counter() - started


def memory(lm: LanguageModel, n: int) -> dict:
    """Bytes of N particles, the prompt stored once or in each, and what the difference should be."""
    shared = jax.eval_shape(lambda: lm.given(PROMPT).start())
    alone = jax.eval_shape(lambda: lm.start(lm.read(PROMPT)))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    c, length = lm.config, lm.encode(PROMPT)[0].shape[0]
    prompt = 2 * c.num_layers * c.num_kv_heads * length * c.head_size * 4
    return {
        "prompt stored once": n * size(shared) + size(jax.eval_shape(lambda: lm.read(PROMPT))),
        "prompt in each": n * size(alone),
        "keys and values of the prompt": prompt,
    }


def compilations(run) -> int:
    """When another prompt of the same size is read."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: found.append(event) if "backend_compile" in event else None
    )
    run(1, OTHER)
    return len(found)


def measure(folder: Path, particles: list[int], tokens: int, repeats: int) -> dict:
    """One model."""
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        made = endless(folder, Path(place))
        lm = LanguageModel.from_pretrained(
            made, delimiter="\0", temperature=1.0, step_tokens=tokens, max_tokens=tokens
        )
        prompt_length = int(lm.encode(PROMPT)[1])
        for n in particles:
            contenders = ours(lm, n, tokens), theirs(made, n, tokens)
            for run in contenders:
                run(0)  # compiles, warms
            times = np.array(
                [[seconds(run, seed) for run in contenders] for seed in range(repeats)]
            )
            ratios = times[:, 1] / times[:, 0]
            cost = token_step(lm.config, tokens // 2, num_particles=n, prompt_length=prompt_length)
            rows[n] = {
                "ratio": float(np.median(ratios)),
                "quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
                "token-step": {
                    "FLOPs": float(cost.flops),
                    "bytes of weights": float(cost.weight_bytes),
                    "bytes of keys and values": float(cost.kv_bytes),
                },
                "bytes of particles": memory(lm, n),
                "compilations for another prompt": compilations(contenders[0]),
            }
            if jax.default_backend() != "cpu":  # absolute times mean something there
                bound = decode_cost(lm.config, tokens, num_particles=n, prompt_length=prompt_length)
                rows[n]["tokens a second"] = n * tokens / float(np.median(times[:, 0]))
                rows[n]["bytes moved"] = bound.weight_bytes + bound.kv_bytes
            print(folder.name, n, f"{rows[n]['ratio']:.2f}", rows[n]["quartiles"], flush=True)
        return {
            "parameters": num_parameters(lm.config),
            "prompt tokens": prompt_length,
            "rows": rows,
        }


def main() -> None:
    """Measure, print, write."""
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="*", help="folders in the Hugging Face layout")
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96, help="of a text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the shipped model, writes nothing")
    options = parser.parse_args()
    found = [shipped("reasoner")]
    if (smollm2_folder() / "config.json").is_file() and not options.quick:
        found.append(smollm2_folder())
    folders = options.model or found
    models = {
        folder.name: measure(folder, options.particles, options.tokens, options.repeats)
        for folder in folders
    }
    if options.quick:
        return
    rows = [
        [f"{name}, {model['parameters'] / 1e6:.1f} M parameters"]
        + [
            f"{row['ratio']:.1f} ({row['quartiles'][0]:.1f} to {row['quartiles'][1]:.1f})"
            for row in model["rows"].values()
        ]
        for name, model in models.items()
    ]
    result = {
        "question": __doc__.splitlines()[0],
        **made_with("jax", "flax", "smcscale", "torch", "transformers"),
        "tokens of a text": options.tokens,
        "models": models,
        "table": {
            "columns": [
                "tokens a second, times those of `transformers.generate`, median (quartiles)",
                *(f"{n} particle{'s' if n > 1 else ''}" for n in options.particles),
            ],
            "rows": rows,
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
