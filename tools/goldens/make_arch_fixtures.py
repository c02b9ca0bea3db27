#!/usr/bin/env python3
"""Makes fixtures/arch: per architecture a tiny GGUF file and what Hugging Face transformers computes on its weights.

    python -m venv .venv && .venv/bin/pip install -r tools/goldens/requirements.txt
    .venv/bin/python tools/goldens/make_arch_fixtures.py                # writes fixtures/arch
    .venv/bin/python tools/goldens/make_arch_fixtures.py --check        # compares with what is there, writes nothing
    .venv/bin/python tools/goldens/make_arch_fixtures.py --only qwen2   # one file

The GGUF files come out byte for byte the same everywhere. Goldens agree to float32 rounding: the order in which a
CPU's matrix library sums is its own.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from fixture_specs import SPECS, Spec
from hf_golden import GoldenModel
from tiny_gguf import control_ids, vocabulary, write_gguf

OUT = Path(__file__).resolve().parents[2] / "fixtures" / "arch"
SIZE_LIMIT = 400_000
"""Bytes of all files together."""
LOGIT_MARGIN = 0.15
"""Least distance of the two best logits where a greedy token is chosen: int8 activations must not flip it."""
ROUTER_MARGIN = 0.05
"""Least distance of the k-th and the next router logit at every position, for the same reason."""
DISTINCT_GREEDY = 5
"""Least number of different tokens in the greedy continuation: one repeated token would show little."""
PROMPTS_AT_ONCE, ROUNDS = 256, 64
CHECK_TOLERANCE = 1e-5


def least_router_margin(spec: Spec, stages: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per sequence of the batch, over layers and positions; infinite for a dense model."""
    least = torch.full_like(stages["lm_head"][:, 0, 0], torch.inf)
    for layer in range(spec.n_layer if spec.n_expert else 0):
        logits = stages[f"blk.{layer}.moe_router_logits"].sort(dim=-1, descending=True).values
        gap = logits[..., spec.n_expert_used - 1] - logits[..., spec.n_expert_used]
        least = torch.minimum(least, gap.min(dim=1).values)
    return least


def continue_greedily(spec: Spec, model: GoldenModel, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy tokens [batch, n_greedy], and which prompts [batch] stay clear of every near-tie and control token."""
    tokens = prompts
    clear = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(spec.n_greedy):
        best = model.forward(tokens)["lm_head"][:, -1].topk(2)
        clear &= best.values[:, 0] - best.values[:, 1] >= LOGIT_MARGIN
        tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    clear &= least_router_margin(spec, model.forward(tokens)) >= ROUTER_MARGIN
    greedy = tokens[:, spec.n_prompt :]
    clear &= ~torch.isin(greedy, torch.tensor(control_ids())).any(dim=1)
    clear &= torch.tensor([len(set(row.tolist())) >= DISTINCT_GREEDY for row in greedy])
    return greedy, clear


def choose_prompt(spec: Spec, model: GoldenModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The first prompt drawn, [1, n_prompt], whose continuation is clear of near-ties, and its greedy tokens."""
    generator = np.random.default_rng([spec.seed, 0])
    for _ in range(ROUNDS):
        drawn = generator.integers(0, len(vocabulary()[0]), size=(PROMPTS_AT_ONCE, spec.n_prompt))
        prompts = torch.from_numpy(drawn)
        greedy, clear = continue_greedily(spec, model, prompts)
        if clear.any():
            first = int(clear.nonzero()[0])
            return prompts[first : first + 1], greedy[first]
    sys.exit(f"{spec.name}: no prompt of {ROUNDS * PROMPTS_AT_ONCE} is clear of near-ties; change the spec's seed")


def kept(spec: Spec, name: str) -> bool:
    if not name.startswith("blk."):
        return True
    _, layer, stage = name.split(".")
    stages = spec.stages[int(layer)]
    return stages is None or stage in stages


def golden(spec: Spec, gguf_path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The golden's tensors and its metadata."""
    model = GoldenModel(spec, gguf_path)
    prompt, greedy = choose_prompt(spec, model)
    stages = model.forward(prompt)
    tensors = {}
    for name, value in stages.items():
        if kept(spec, name):
            rows = value[0, -spec.n_rows :]
            tensors[name] = rows.to(torch.int32 if name.endswith("indices") else torch.float32).contiguous().numpy()
    tensors["tokens"] = prompt[0].to(torch.int32).numpy()
    tensors["greedy"] = greedy.to(torch.int32).numpy()
    about = {
        "model": gguf_path.name,
        "model_sha256": hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        "positions": list(range(spec.n_prompt - spec.n_rows, spec.n_prompt)),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    # One key only: safetensors writes several in an order that changes from run to run.
    return tensors, {"golden": json.dumps(about, sort_keys=True)}


def make(spec: Spec, folder: Path) -> tuple[Path, Path]:
    model_path, golden_path = folder / f"{spec.name}.gguf", folder / f"{spec.name}.safetensors"
    write_gguf(spec, model_path)
    tensors, metadata = golden(spec, model_path)
    save_file(tensors, golden_path, metadata=metadata)
    rms = {name: float(np.sqrt(np.mean(np.square(t)))) for name, t in tensors.items() if t.dtype == np.float32}
    low, high = min(rms, key=rms.get), max(rms, key=rms.get)
    print(
        f"{spec.name}: gguf {model_path.stat().st_size}, golden {golden_path.stat().st_size} bytes; "
        f"RMS {rms[low]:.2f} ({low}) to {rms[high]:.2f} ({high}), logits {tensors['lm_head'].std():.2f}; "
        f"greedy {tensors['greedy'].tolist()}"
    )
    return model_path, golden_path


def differences(made: Path, there: Path) -> list[str]:
    """What differs between a file just made and the one in the repository."""
    if not there.exists():
        return [f"{there.name}: missing"]
    if made.suffix == ".gguf":
        return [] if made.read_bytes() == there.read_bytes() else [f"{there.name}: bytes differ"]
    ours, theirs = load_file(made), load_file(there)
    if ours.keys() != theirs.keys():
        return [f"{there.name}: tensors differ: {sorted(ours.keys() ^ theirs.keys())}"]
    return [
        f"{there.name}: {name} differs"
        for name in ours
        if ours[name].shape != theirs[name].shape
        or not np.allclose(ours[name], theirs[name], rtol=CHECK_TOLERANCE, atol=CHECK_TOLERANCE)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=[spec.name for spec in SPECS])
    parser.add_argument("--check", action="store_true", help="compare with the files in --out instead of writing them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    specs = [spec for spec in SPECS if args.only in (None, spec.name)]
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            pairs = [(made, args.out / made.name) for spec in specs for made in make(spec, Path(folder))]
            found = [line for made, there in pairs for line in differences(made, there)]
        sys.exit("\n".join(found) or print("same"))
    args.out.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        make(spec, args.out)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out.name}: {total} bytes")
    if total > SIZE_LIMIT:
        sys.exit(f"fixtures/arch is {total} bytes, and {SIZE_LIMIT} is the limit: shrink a spec")


if __name__ == "__main__":
    main()
