"""Trains the demo model: `python train.py --steps N`. Resumable: killed at any point, the same command goes on.

Muon (momentum, then the nearest orthogonal matrix by Newton-Schulz steps; Jordan et al. 2024) for the matrices of the
layers, Adam for embedding, output, router and norms. Constant rate, then linear to zero over the last 70 % of the steps.
The last tenth sees contexts of 1,024 tokens instead of 512. On a GPU matrices are multiplied in bf16 and TF32.
"""
import argparse, json, math, os, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
import torch.nn.functional as F
from data import SEED, WORK
from model import create, forward

BATCH = 8192  # tokens per step


def batch(data, step, steps):
    """Rows of token ids [batch, length + 1] of one step, a function of the step alone: each epoch visits every window once."""
    length = 512 if step < 0.9 * steps else 1024
    rows, windows = BATCH // length, (len(data) - 1) // length - 1
    at = []
    for i in range(step * rows, (step + 1) * rows):
        epoch, k = divmod(i, windows)
        rng = np.random.default_rng([SEED, length, epoch])
        shift, order = rng.integers(length), rng.permutation(windows)
        at.append(shift + order[k] * length)
    return torch.from_numpy(np.stack([data[i:i + length + 1] for i in at]).astype(np.int64))


def orthogonal(g):
    """The nearest semi-orthogonal matrix to each of g [n, rows, columns], roughly: singular values end near 1."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(4):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum 0.95 with Nesterov's look-ahead; matrices of one shape are made orthogonal together."""
    def __init__(self, params):
        self.params, self.momentum = params, [torch.zeros_like(p) for p in params]

    def step(self, grads, rate, workers):
        """One update; each matrix is a task of its own."""
        @torch.no_grad()
        def update(p, m, g):
            m.mul_(0.95).add_(g)
            side = p.shape[-1]
            rows = min(p.shape[-2], side)  # gate and up, stored together, count as two matrices
            p.sub_(orthogonal(g.add(m, alpha=0.95).view(-1, rows, side)).reshape(p.shape), alpha=rate)
        list(workers.map(update, self.params, self.momentum, grads))


def bits_per_byte(m, tokenizer, passages, device):
    """Mean over passages' bytes of the model's surprise in bits; each passage stands alone after <|endoftext|>."""
    start, bits, size = tokenizer.token_to_id("<|endoftext|>"), 0.0, 0
    for text in passages:
        ids = torch.tensor([[start] + tokenizer.encode(text).ids], device=device)[:, :1025]
        with torch.no_grad():
            logits = forward(m, ids[:, :-1])[0]
        bits += F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item() / math.log(2)
        size += len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    return bits / size


def gradients(m, ids, named, workers, count):
    """(loss, balance loss, load, gradients by name) of a batch: `count` workers take equal shares of its rows, and the shares
    are added in order, so that the result does not depend on timing. One thread a share loses less than two threads a
    matrix product where other programs use the cores too."""
    def share(rows):
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
            logits, aux, load = forward(m, rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        total = (loss + m.config.router_aux_loss_coef * aux) / count
        return loss.item() / count, aux.item() / count, load, torch.autograd.grad(total, list(named.values()))
    loss, aux, load, grads = zip(*workers.map(share, ids.chunk(count)))
    return sum(loss), sum(aux), sum(load), {n: sum(g) for n, g in zip(named, zip(*grads))}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=1000, help=f"steps of {BATCH} tokens")
    ap.add_argument("--out", default=str(WORK), help="folder of checkpoint.pt and history.json")
    ap.add_argument("--every", type=float, default=300, help="seconds between checkpoints")
    ap.add_argument("--stop", type=int, help="stop at this step, as if killed, for tests")
    a = ap.parse_args()
    from tokenizers import Tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    count = 1 if device == "cuda" else max(c for c in (1, 2, 4, 8) if c <= len(os.sched_getaffinity(0)))
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer.json"))
    held = [json.loads(line)["text"] for line in (WORK / "heldout.jsonl").open()]
    data = np.fromfile(WORK / "train.bin", np.uint16)
    m = create(SEED).to(device)
    named = dict(m.named_parameters())
    matrices = {n: p for n, p in named.items() if p.dim() > 1 and not any(s in n for s in ("embed_tokens", "lm_head", "mlp.gate."))}
    adam = torch.optim.Adam([{"params": [named["model.embed_tokens.weight"]], "lr": 1e-2}, {"params": [named["lm_head.weight"]], "lr": 3e-3},
                             {"params": [p for n, p in named.items() if p.dim() == 1 or "mlp.gate." in n], "lr": 2e-3}], betas=(0.9, 0.95), fused=True)
    muon, base, history, begin = Muon(list(matrices.values())), [g["lr"] for g in adam.param_groups], [], 0
    path = os.path.join(a.out, "checkpoint.pt")
    if os.path.exists(path):
        c = torch.load(path, map_location=device)
        if c["steps"] != a.steps:
            print(f"the plan changes from {c['steps']} steps to {a.steps}")
        m.load_state_dict(c["model"]), adam.load_state_dict(c["adam"])
        muon.momentum, history, begin = c["momentum"], c["history"], c["step"]
        print(f"resumed at step {begin}")

    def save(step):
        torch.save(dict(step=step, steps=a.steps, model=m.state_dict(), adam=adam.state_dict(), momentum=muon.momentum, history=history), path + ".part")
        os.replace(path + ".part", path)
        with open(os.path.join(a.out, "history.json"), "w") as f:
            json.dump(history, f)

    saved, cpu, shown = time.time(), time.process_time(), time.time()
    losses, loads = [], 0
    for step in range(begin, a.steps):
        share = min(1.0, (step + 1) / 20, (a.steps - step) / (0.7 * a.steps))
        for g, rate in zip(adam.param_groups, base):
            g["lr"] = rate * share
        ids = batch(data, step, a.steps).to(device)
        loss, aux, load, grads = gradients(m, ids, named, workers, count)
        for n, p in named.items():
            p.grad = None if n in matrices else grads[n]
        adam.step(), muon.step([grads[n] for n in matrices], 0.02 * share, workers)
        losses.append(loss)
        loads = loads + load
        if (step + 1) % 10 == 0 or step + 1 == a.steps:
            entry = dict(step=step + 1, loss=sum(losses) / len(losses), aux=aux, load=(loads / loads.sum(1, keepdim=True)).tolist())
            if (step + 1) % 50 == 0 or step + 1 == a.steps:
                entry["bits_per_byte"] = bits_per_byte(m, tokenizer, held[::8] if step + 1 < a.steps else held, device)
            entry["cpu_s"] = time.process_time() - cpu + (history[-1]["cpu_s"] if history else 0)
            cpu = time.process_time()
            history.append(entry)
            print(f"step {step + 1}/{a.steps} loss {entry['loss']:.4f} aux {entry['aux']:.3f} bpb {entry.get('bits_per_byte', math.nan):.3f}"
                  f" cpu {entry['cpu_s']:.0f} s, {(time.time() - shown) / 10:.2f} s/step", flush=True)
            losses, loads, shown = [], 0, time.time()
            # only here, so that a resumed run averages over the same steps
            if time.time() - saved > a.every or step + 1 == a.steps or step + 1 == a.stop:
                save(step + 1)
                saved = time.time()
            if step + 1 == a.stop:
                return


if __name__ == "__main__":
    main()
