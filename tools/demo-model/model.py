"""The demo model: its shape, and a forward of its own on the parameters of Hugging Face's Qwen3MoeForCausalLM.

transformers defines what the model is; its module computes experts in a way that is slow to train on a CPU. `forward`
computes the same function from the same parameters with one matrix product per expert. `python model.py` checks that
the logits agree.
"""
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPE = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             num_experts=16, num_experts_per_tok=2, moe_intermediate_size=256, max_position_embeddings=1024)


def config():
    return Qwen3MoeConfig(**SHAPE, intermediate_size=512, rms_norm_eps=1e-6, norm_topk_prob=True, tie_word_embeddings=False,
                          rope_parameters={"rope_theta": 1e5, "rope_type": "default"}, router_aux_loss_coef=0.03)


def create(seed):
    """The model with fresh weights: matrices keep the size of what passes them, branches begin small."""
    torch.manual_seed(seed)
    m = Qwen3MoeForCausalLM(config())
    for name, p in m.named_parameters():
        if p.dim() > 1:
            std = {"embed_tokens": 0.1, "lm_head": 0.01, "gate": 0.02}.get(name.split(".")[-2], p.shape[-1] ** -0.5)
            if name.endswith(("down_proj", "o_proj.weight")):
                std *= 0.3
            torch.nn.init.normal_(p, std=std)
    return m


def rope_tables(length, cfg, device):
    inverse = cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, cfg.head_dim, 2, device=device) / cfg.head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rope(x, tables):
    a, b = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-b, a], -1) * tables[1]


def experts(x, chosen, weights, gate_up, down):
    """x [n, hidden], chosen and weights [n, k]: the weighted sum of each row's experts."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    row = order // chosen.shape[1]
    counts = torch.bincount(flat, minlength=gate_up.shape[0])
    out = []
    for rows, gu, d in zip(x[row].split(counts.tolist()), gate_up.unbind(0), down.unbind(0)):
        gate, up = F.linear(rows, gu).chunk(2, -1)
        out.append(F.linear(F.silu(gate) * up, d))
    out = torch.cat(out) * weights.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return out[back].view(*chosen.shape, -1).sum(1), counts


def forward(m, ids, weight=lambda p: p):
    """ids [batch, length] to (logits, auxiliary loss, tokens per expert [layers, experts]); `weight` sees every matrix first."""
    cfg = m.config
    b, n = ids.shape
    norm = lambda x, w: F.rms_norm(x, x.shape[-1:], w.to(x.dtype), cfg.rms_norm_eps)
    tables = rope_tables(n, cfg, ids.device)
    x = F.embedding(ids, weight(m.model.embed_tokens.weight)).view(b * n, -1)
    aux, loads = 0.0, []
    for layer in m.model.layers:
        a, h = layer.self_attn, norm(x, layer.input_layernorm.weight)
        heads = lambda p: F.linear(h, weight(p.weight)).view(b, n, -1, cfg.head_dim)
        q = rope(norm(heads(a.q_proj), a.q_norm.weight).transpose(1, 2), tables)
        k = rope(norm(heads(a.k_proj), a.k_norm.weight).transpose(1, 2), tables)
        v = heads(a.v_proj).transpose(1, 2)
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True).transpose(1, 2).reshape(b * n, -1)
        x = x + F.linear(y, weight(a.o_proj.weight))
        h = norm(x, layer.post_attention_layernorm.weight)
        p = F.linear(h.float(), layer.mlp.gate.weight.float()).softmax(-1)
        top, chosen = p.topk(cfg.num_experts_per_tok, -1)
        y, counts = experts(h, chosen, top / top.sum(-1, keepdim=True), weight(layer.mlp.experts.gate_up_proj), weight(layer.mlp.experts.down_proj))
        x = x + y
        # Switch Transformer's balance loss (arXiv 2101.03961, section 2.2) per layer; 1 is even
        aux = aux + cfg.num_experts * (counts / counts.sum() * p.mean(0)).sum() / cfg.num_hidden_layers
        loads.append(counts)
    x = norm(x, m.model.norm.weight)
    return F.linear(x, weight(m.lm_head.weight)).view(b, n, -1), aux, torch.stack(loads)


if __name__ == "__main__":
    m = create(1).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        worst = (m(ids).logits - forward(m, ids)[0]).abs().max().item()
    print(f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M parameters; largest difference to Hugging Face's logits {worst:.1e}")
    assert worst < 1e-4
