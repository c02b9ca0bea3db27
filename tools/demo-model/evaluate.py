"""What the demo model is worth: held-out bits per byte, perplexities, the cost of every quant type, goldens for the tests, pictures.

`python evaluate.py` reads demo-f32.gguf, demo.gguf and history.json in work/, and writes results.json, golden.json and heldout.txt,
by which the Rust tests judge, the table of docs/demo-model.md and the pictures of docs/images. Logits are Hugging Face
transformers' in float32.
"""
import argparse, json, math
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import gguf
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM
from data import HERE, WORK
from kquants import quantize
from model import config, forward
from train import bits_per_byte

WINDOW = 512
GOLDEN_WINDOWS, GOLDEN_TOP = 8, 32


def windows(tokenizer, text):
    """Token windows of the text, each after <|endoftext|>: every token is judged once, with up to 511 before it."""
    ids, start = tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")
    return [[start] + ids[i:i + WINDOW] for i in range(0, len(ids), WINDOW)]


@torch.no_grad()
def log_probs(m, rows):
    return [m(torch.tensor([row[:-1]])).logits[0].log_softmax(-1) for row in rows]


def perplexity(lp, rows):
    nll = sum(F.nll_loss(p, torch.tensor(row[1:]), reduction="sum").item() for p, row in zip(lp, rows))
    return math.exp(nll / sum(len(row) - 1 for row in rows))


def divergence(a, b):
    """Kullback-Leibler divergence of every position's distribution b from a."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(a, b)])


def model_of(arrays):
    """Hugging Face's model of GGUF-named float32 arrays."""
    m = Qwen3MoeForCausalLM(config()).eval()
    state = m.state_dict()
    got = {name: torch.from_numpy(np.array(a, np.float32)) for name, a in arrays.items()}
    renamed = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    rules = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
             "mlp.gate": "ffn_gate_inp"}
    for name in state:
        if name in renamed:
            state[name] = got[renamed[name] + ".weight"]
            continue
        _, _, layer, rest = name.split(".", 3)
        g = f"blk.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            state[name] = torch.cat([got[g + "ffn_gate_exps.weight"], got[g + "ffn_up_exps.weight"]], 1)
        elif rest == "mlp.experts.down_proj":
            state[name] = got[g + "ffn_down_exps.weight"]
        else:
            state[name] = got[g + rules[rest.removesuffix(".weight")] + ".weight"]
    m.load_state_dict(state)
    return m


def file_arrays(path):
    return {t.name: dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]]) for t in gguf.GGUFReader(path).tensors}


def rounded(arrays, qtype):
    """All matrices but the routers in one quant type, as if written to a file and read back."""
    keep = lambda name, a: a.ndim == 1 or "ffn_gate_inp" in name
    return {name: a if keep(name, a) else dequantize(quantize(a, qtype), qtype).reshape(a.shape) for name, a in arrays.items()}


def golden(lp, rows):
    """The most likely tokens at eight positions of each of eight windows, and the share of all others."""
    out = []
    for row, p in list(zip(rows, lp))[:GOLDEN_WINDOWS]:
        at = np.linspace(len(p) // 8, len(p) - 1, 8).astype(int).tolist()
        top = p[at].topk(GOLDEN_TOP)
        out.append(dict(tokens=row[:at[-1] + 1], positions=at, ids=top.indices.tolist(), logprobs=[[round(v, 5) for v in r] for r in top.values.tolist()]))
    return out


def table(arrays, exact, rows):
    lines = []
    for qtype in [T.Q8_0, T.Q6_K, T.Q5_K, T.Q5_1, T.Q5_0, T.Q4_K, T.Q4_1, T.Q4_0, T.IQ4_NL, T.IQ4_XS, T.MXFP4, T.Q3_K, T.Q2_K]:
        lp = log_probs(model_of(rounded(arrays, qtype)), rows)
        kl = divergence(exact, lp)
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        lines.append(dict(type=qtype.name, bits=8 * size / block, mean_kl=kl.mean().item(), median_kl=kl.median().item(),
                          perplexity=perplexity(lp, rows)))
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def expert_loads(m, tokenizer, held):
    """Share of each layer's tokens that each expert takes, by source: {source: [layers][experts]}."""
    loads = {}
    for h in held:
        ids = torch.tensor([tokenizer.encode(h["text"]).ids[:1024]])
        loads[h["source"]] = loads.get(h["source"], 0) + forward(m, ids)[2]
    return {s: (n / n.sum(1, keepdim=True)).tolist() for s, n in loads.items()}


def pictures(history, loads, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    steps = [h["step"] for h in history]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, [h["loss"] for h in history], label="training, nats per token")
    left.plot(*zip(*[(h["step"], h["bits_per_byte"]) for h in history if "bits_per_byte" in h]), "o-", ms=3, label="held out, bits per byte")
    left.set(xlabel="step of 8,192 tokens", ylim=(1.5, 8.2))
    load = np.array([h["load"] for h in history]) * len(history[0]["load"][0])
    for i in range(load.shape[1]):
        right.plot(steps, load[:, i].max(-1), color=f"C{i}", label=f"layer {i}")
        right.plot(steps, load[:, i].min(-1), color=f"C{i}", ls=":")
    right.set(xlabel="step", ylabel="load of the busiest and the idlest expert\n(1 is even)", ylim=(0, None))
    left.legend(), right.legend(ncols=2, fontsize=8)
    fig.savefig(folder / "demo-training.svg")
    sources = list(loads)
    fig, axes = plt.subplots(1, len(sources), figsize=(11, 2.3), layout="constrained", sharey=True)
    for ax, source in zip(axes, sources):
        image = ax.imshow(np.array(loads[source]) * len(loads[source][0]), vmin=0, vmax=4, cmap="viridis", aspect="auto")
        ax.set(title=source, xlabel="expert")
    axes[0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="load (1 is even)")
    fig.savefig(folder / "demo-experts.png", dpi=90)


def write_table(result, page):
    """The table of quant types between the page's two marks."""
    row = lambda name, bits, kl, mean, ppl: f"| {name} | {bits:.1f} | {kl:.5f} | {mean:.5f} | {ppl:.2f} |"
    rows = ["| type | bits per weight | median KL | mean KL | perplexity |", "|---|---|---|---|---|", f"| float32 | 32 | 0 | 0 | {result['perplexity_f32']:.2f} |",
            row("Q4_K_M (the file)", 4.9, result["median_kl_q4_k_m"], result["mean_kl_q4_k_m"], result["perplexity_q4_k_m"])]
    rows += [row(t["type"], t["bits"], t["median_kl"], t["mean_kl"], t["perplexity"]) for t in result["quant_types"]]
    before, rest = page.read_text().split("<!-- quant types -->\n", 1)
    page.write_text(before + "<!-- quant types -->\n" + "\n".join(rows) + "\n<!-- end -->" + rest.split("<!-- end -->", 1)[1])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", default=str(WORK), help="folder of checkpoint.pt and demo.gguf")
    ap.add_argument("--out", default=str(HERE), help="folder of the results")
    ap.add_argument("--docs", default=str(HERE / "../../docs"), help="folder of demo-model.md and images/")
    a = ap.parse_args()
    run, out = Path(a.run), Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer.json"))
    held = [json.loads(line) for line in (WORK / "heldout.jsonl").open()]
    text = (WORK / "heldout.txt").read_text()
    rows = windows(tokenizer, text)
    exact_arrays, file = file_arrays(run / "demo-f32.gguf"), file_arrays(run / "demo.gguf")
    m, q = model_of(exact_arrays), model_of(file)
    exact, lp = log_probs(m, rows), log_probs(q, rows)
    kl = divergence(exact, lp)
    history = json.loads((run / "history.json").read_text())
    result = dict(
        how="Hugging Face transformers, float32, windows of 512 tokens of heldout.txt, each after <|endoftext|>",
        held_out=dict(passages=len(held), bytes=sum(len(h["text"].encode()) for h in held), bits_per_byte=bits_per_byte(m, tokenizer, [h["text"] for h in held], "cpu"),
                      bits_per_byte_q4_k_m=bits_per_byte(q, tokenizer, [h["text"] for h in held], "cpu")),
        by_source={s: bits_per_byte(m, tokenizer, [h["text"] for h in held if h["source"] == s], "cpu") for s in dict.fromkeys(h["source"] for h in held)},
        tokens=sum(len(r) - 1 for r in rows), perplexity_f32=perplexity(exact, rows), perplexity_q4_k_m=perplexity(lp, rows),
        mean_kl_q4_k_m=kl.mean().item(), median_kl_q4_k_m=kl.median().item(), training=dict(steps=history[-1]["step"], cpu_seconds=round(history[-1]["cpu_s"])))
    print(json.dumps(result, indent=1), flush=True)
    (out / "golden.json").write_text(json.dumps(golden(lp, rows)) + "\n")
    (out / "heldout.txt").write_text(text)
    pictures(history, expert_loads(q, tokenizer, held), Path(a.docs) / "images")
    result["quant_types"] = table(exact_arrays, exact, rows)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(result, Path(a.docs) / "demo-model.md")


if __name__ == "__main__":
    main()
