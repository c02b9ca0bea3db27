"""The trained checkpoint as GGUF: `python export.py` writes work/demo-f32.gguf and work/demo.gguf (the Q4_K_M mix)."""
import argparse, json, os
from pathlib import Path
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from data import SPECIAL, WORK
from kquants import quantize
from model import SHAPE, config

# The template writes control tokens; what a message says stays text.
CHATML = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
          "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}


def more_bits(layer, n):
    """The layers whose attn_v and ffn_down are Q6_K in llama.cpp's Q4_K_M."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def tensors(state):
    """(GGUF name, float32 array, wants more bits) of every tensor of Hugging Face's state."""
    get = lambda name: state[name].float().cpu().numpy()
    yield "token_embd.weight", get("model.embed_tokens.weight"), False
    for i in range(SHAPE["num_hidden_layers"]):
        h, g, more = f"model.layers.{i}.", f"blk.{i}.", more_bits(i, SHAPE["num_hidden_layers"])
        yield g + "attn_norm.weight", get(h + "input_layernorm.weight"), False
        for theirs, ours in ATTENTION.items():
            yield g + ours + ".weight", get(h + f"self_attn.{theirs}.weight"), more and ours == "attn_v"
        yield g + "ffn_norm.weight", get(h + "post_attention_layernorm.weight"), False
        yield g + "ffn_gate_inp.weight", get(h + "mlp.gate.weight"), False
        gate, up = np.split(get(h + "mlp.experts.gate_up_proj"), 2, axis=1)
        yield g + "ffn_gate_exps.weight", np.ascontiguousarray(gate), False
        yield g + "ffn_up_exps.weight", np.ascontiguousarray(up), False
        yield g + "ffn_down_exps.weight", get(h + "mlp.experts.down_proj"), more
    yield "output_norm.weight", get("model.norm.weight"), False
    yield "output.weight", get("lm_head.weight"), True


def tokenizer(w):
    tok = json.loads((WORK / "tokenizer.json").read_text())
    vocab = sorted(tok["model"]["vocab"], key=tok["model"]["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in tok["model"]["merges"]]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(vocab + SPECIAL)
    w.add_token_types([gguf.TokenType.NORMAL] * len(vocab) + [gguf.TokenType.CONTROL] * len(SPECIAL))
    w.add_token_merges(merges)
    w.add_eos_token_id(len(vocab) + SPECIAL.index("<|im_end|>"))
    w.add_pad_token_id(len(vocab) + SPECIAL.index("<|endoftext|>"))
    w.add_add_bos_token(False)
    w.add_chat_template(CHATML)


def write(path, state, base, more, file_type):
    cfg = config()
    w = gguf.GGUFWriter(path, "qwen3moe")
    w.add_name("demo")
    w.add_description("A small Qwen3-MoE trained from scratch on public-domain English: Shakespeare, the King James Bible, Austen, "
                      "Carroll, Milton and the Jargon File. It continues text in their manner and knows nothing else.")
    w.add_license("MIT OR Apache-2.0")
    w.add_sampling_temp(0.5)
    w.add_sampling_top_p(0.9)
    w.add_sampling_min_p(0.1)
    w.add_sampling_penalty_repeat(1.05)
    w.add_block_count(cfg.num_hidden_layers)
    w.add_context_length(cfg.max_position_embeddings)
    w.add_embedding_length(cfg.hidden_size)
    w.add_feed_forward_length(cfg.moe_intermediate_size * cfg.num_experts_per_tok)
    w.add_head_count(cfg.num_attention_heads)
    w.add_head_count_kv(cfg.num_key_value_heads)
    w.add_key_length(cfg.head_dim)
    w.add_value_length(cfg.head_dim)
    w.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    w.add_expert_count(cfg.num_experts)
    w.add_expert_used_count(cfg.num_experts_per_tok)
    w.add_expert_feed_forward_length(cfg.moe_intermediate_size)
    w.add_file_type(file_type)
    w.add_quantization_version(2)
    tokenizer(w)
    for name, array, wants_more in tensors(state):
        qtype = T.F32 if array.ndim == 1 or "ffn_gate_inp" in name else more if wants_more else base
        data = array.astype(np.float32) if qtype == T.F32 else quantize(array, qtype)
        w.add_tensor(name, data, raw_dtype=None if qtype == T.F32 else qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--run", default=str(WORK), help="folder of checkpoint.pt, where the files are written")
    a = ap.parse_args()
    state = torch.load(Path(a.run) / "checkpoint.pt", map_location="cpu")["model"]
    write(Path(a.run) / "demo-f32.gguf", state, T.F32, T.F32, 0)
    write(Path(a.run) / "demo.gguf", state, T.Q4_K, T.Q6_K, 15)


if __name__ == "__main__":
    main()
