#!/usr/bin/env python3
"""Traces a Hugging Face transformers model in the file format of `apr trace`, so that `apr diff` can compare.

    hf_trace.py model.gguf --tokens 100,200,300 --out hf.safetensors
    hf_trace.py MODEL_DIR --prompt "Hello" --positions last --out hf.safetensors
    apr diff model.gguf hf.safetensors

A GGUF file is dequantized exactly (gguf-py) and put into the transformers class of its architecture, so the trace is
what the file's weights mean, without activation quantization. A model folder, or a name on the Hugging Face hub, is
loaded by transformers itself. Architectures: qwen3moe, qwen3, qwen2, llama.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import gguf
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import linear, silu
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

CLASSES = {"qwen3moe": "Qwen3Moe", "qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DENSE = ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out")
ROUTER = ("moe_router_logits", "moe_router", "moe_router_indices")
EXPERT = ("moe_expert_gate", "moe_expert_up", "moe_expert_swigl", "moe_expert_out")
SCORES = ("attn_scores", "attn_softmax")
"""Quadratic in the number of tokens, so only traced when named."""
STAGES = (
    "embedding", "attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", *SCORES, "attention", "attn_out",
    "post_attn_residual", "ffn_norm", *DENSE, *ROUTER, *EXPERT, "moe_ffn_out", "post_ffn_residual", "final_norm",
    "lm_head",
)  # fmt: skip

LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
OTHER_WEIGHTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""GGUF's names and transformers', without `.weight` or `.bias`."""
TRACED = "apr_traced"
"""Name under which transformers finds `traced_attention`."""


def fail(message):
    sys.exit(f"hf_trace: {message}")


def architecture(name):
    """GGUF's name of an architecture; transformers' `model_type` differs from it in an underscore."""
    if (arch := name.replace("_", "")) not in CLASSES:
        fail(f"architecture '{name}' is not supported; supported are {', '.join(CLASSES)}")
    return arch


def halves_from_pairs(rows, n_head):
    """From a Llama GGUF's order within a head, x0 y0 x1 y1 ..., to transformers', x0 x1 ... y0 y1 ...; along dim 0."""
    return rows.unflatten(0, (n_head, -1, 2)).transpose(1, 2).reshape(rows.shape)


def pairs_from_halves(values, n_head):
    """The inverse of `halves_from_pairs`, along the last dimension: [T, n_head * head_dim]."""
    return values.unflatten(-1, (n_head, 2, -1)).transpose(-1, -2).reshape(values.shape)


class GgufModel:
    """A GGUF file, and how its keys and tensors become a transformers model."""

    def __init__(self, path, dtype):
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            fail(f"{path} is not a readable GGUF file: {error}")
        self.path, self.fields, self.dtype = path, reader.fields, dtype
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.value("split.count", 1) > 1:
            fail(f"{path} is one part of a split file; join the parts first (llama-gguf-split --merge)")
        self.prefix = self.value("general.architecture")
        self.arch = architecture(self.prefix)

    def value(self, key, default=None):
        """A metadata value; a missing key without a default is an error."""
        if field := self.fields.get(key):
            return field.contents()
        return fail(f"{self.path} has no key '{key}'") if default is None else default

    def hparam(self, key, default=None):
        return self.value(f"{self.prefix}.{key}", default)

    def tensor(self, name):
        """A tensor's exact values, rows first."""
        source = self.tensors[name]
        try:
            values = gguf.quants.dequantize(source.data, source.tensor_type)
        except NotImplementedError:
            fail(f"gguf-py cannot dequantize {source.tensor_type.name} (tensor '{name}')")
        return torch.tensor(values).reshape([int(n) for n in reversed(source.shape)]).to(self.dtype)

    def load(self):
        """The model with every tensor of the file in it, ready to run."""
        try:
            config = self.config()
            with torch.device("meta"):
                model = getattr(transformers, CLASSES[self.arch] + "ForCausalLM")(config).eval()
            model.load_state_dict(self.state(config, model.state_dict()), assign=True)
        except (RuntimeError, ValueError, TypeError) as error:
            fail(f"{self.path} does not fit transformers' {CLASSES[self.arch]}: {error}")
        # The rotation's tables are no weights: on the meta device they hold nothing, so they are made anew.
        rotary = model.model.rotary_emb = type(model.model.rotary_emb)(config)
        if "rope_freqs.weight" in self.tensors:
            divisors = self.tensor("rope_freqs.weight").float()
            if divisors.shape != rotary.inv_freq.shape:
                fail(f"rope_freqs.weight has {len(divisors)} values, expected {len(rotary.inv_freq)}")
            rotary.inv_freq = rotary.inv_freq / divisors
        return model

    def config(self):
        """Sizes as the file's keys give them, with GGUF's defaults for keys that may be missing."""
        n_embd, n_head = self.hparam("embedding_length"), self.hparam("attention.head_count")
        head_dim = self.hparam("attention.key_length", n_embd // n_head)
        if (n_rot := self.hparam("rope.dimension_count", head_dim)) != head_dim:
            fail(f"{self.path} rotates {n_rot} of {head_dim} values of a head; transformers' {self.arch} rotates all")
        if "token_embd.weight" not in self.tensors:
            fail(f"{self.path} has no tensor 'token_embd.weight'")
        options = dict(
            vocab_size=len(self.tensors["token_embd.weight"].data), hidden_size=n_embd, head_dim=head_dim,
            num_hidden_layers=self.hparam("block_count"), num_attention_heads=n_head,
            num_key_value_heads=self.hparam("attention.head_count_kv", n_head),
            rms_norm_eps=self.hparam("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=self.hparam("context_length"), rope_parameters=self.rope(),
            tie_word_embeddings="output.weight" not in self.tensors, attention_bias="blk.0.attn_q.bias" in self.tensors,
            attn_implementation=TRACED, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        if self.arch == "qwen3moe":
            options |= dict(
                num_experts=self.hparam("expert_count"), num_experts_per_tok=self.hparam("expert_used_count"),
                moe_intermediate_size=self.hparam("expert_feed_forward_length"), norm_topk_prob=True,
                experts_implementation="eager",
            )  # fmt: skip
        else:
            options["intermediate_size"] = self.hparam("feed_forward_length")
        return getattr(transformers, CLASSES[self.arch] + "Config")(**options)

    def rope(self):
        """The rotation in transformers' words. `rope_freqs.weight` (Llama 3) comes on top, in `load`."""
        rope = {"rope_theta": self.hparam("rope.freq_base", 1e4 if self.arch == "llama" else 1e6)}
        factor = self.hparam("rope.scaling.factor", self.hparam("rope.scale_linear", 1.0))
        kind = self.hparam("rope.scaling.type", "none" if factor == 1.0 else "linear")
        if kind == "none":
            return rope | {"rope_type": "default"}
        if kind == "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            fail(f"{self.prefix}.rope.scaling.type is '{kind}'; supported are none, linear and yarn")
        magnitude = self.hparam("rope.scaling.attn_factor", self.hparam("rope.scaling.yarn_attn_factor", 1.0))
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.hparam("rope.scaling.original_context_length"),
            "attention_factor": magnitude * (1 + 0.1 * math.log(max(factor, 1.0))),
            "beta_fast": self.hparam("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.hparam("rope.scaling.yarn_beta_slow", 1.0),
        }

    def state(self, config, expected):
        """The file's tensors under transformers' names, q and k in transformers' order."""
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        # transformers gives the output projection a bias wherever q, k and v have one; GGUF files need not have it.
        state = {n: torch.zeros(t.shape, dtype=self.dtype) for n, t in expected.items() if n.endswith("o_proj.bias")}
        for name in self.tensors.keys() - {"rope_freqs.weight"}:
            if match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", name):
                at, part = f"model.layers.{match[1]}.mlp.experts.", match[2]
                if part == "down":
                    state[at + "down_proj"] = self.tensor(name)
                elif part == "gate" and (up := name.replace("gate", "up")) in self.tensors:
                    state[at + "gate_up_proj"] = torch.cat([self.tensor(name), self.tensor(up)], dim=1)
            elif (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)) and match[2] in LAYER_WEIGHTS:
                rows = self.tensor(name)
                if self.arch == "llama" and match[2] in heads:
                    rows = halves_from_pairs(rows, heads[match[2]])
                state[f"model.layers.{match[1]}.{LAYER_WEIGHTS[match[2]]}.{match[3]}"] = rows
            elif (stem := name.removesuffix(".weight")) in OTHER_WEIGHTS:
                state[OTHER_WEIGHTS[stem] + ".weight"] = self.tensor(name)
            else:
                fail(f"{self.path} has a tensor that {self.arch} does not have: '{name}'")
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state


def load_folder(name, dtype):
    """A model folder or a name on the hub, loaded by transformers, and its architecture as GGUF names it."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        arch = architecture(config.model_type)
        if config.hidden_act != "silu":
            fail(f"{name} has the activation '{config.hidden_act}'; {arch} in GGUF has silu")
        if arch == "qwen3moe" and not config.norm_topk_prob:
            fail(f"{name} has norm_topk_prob = false; {arch} in GGUF always makes router weights sum to 1")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=TRACED, experts_implementation="eager"
        )
    except (OSError, ValueError) as error:
        fail(f"cannot load {name}: {error}")
    return model.eval(), arch


def traced_attention(module, query, key, value, attention_mask, scaling, **options):
    """transformers' own attention (eager where a score stage is wanted, else sdpa), and a record of what went in."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = eager if module.trace_scores else sdpa_attention_forward
    out, weights = attend(module, query, key, value, attention_mask, scaling=scaling, **options)
    module.trace(query, key, scaling, weights)
    return out, weights


AttentionInterface.register(TRACED, traced_attention)
AttentionMaskInterface.register(TRACED, sdpa_mask)


class Recorder:
    """Hooks on every stage of a model. `tensors` holds the saved positions of the wanted stages of a pass."""

    def __init__(self, model, arch, wanted, positions):
        self.wanted, self.rows, self.tensors = wanted, torch.tensor(positions), {}
        self.heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
        self.file_order = pairs_from_halves if arch == "llama" else lambda values, n_head: values
        if trace_scores := not wanted.isdisjoint(SCORES):
            AttentionMaskInterface.register(TRACED, eager_mask)
        self.hook(model.model.embed_tokens, out="embedding")
        self.hook(model.model.norm, out="final_norm")
        model.lm_head.register_forward_hook(lambda _m, _i, out: self.put("lm_head", out[0]))
        for index, layer in enumerate(model.model.layers):
            at = f"blk.{index}."
            layer.self_attn.trace_scores = trace_scores
            self.hook_attention(at, layer.self_attn)
            self.hook(layer.input_layernorm, out=at + "attn_norm")
            self.hook(layer.post_attention_layernorm, into=at + "post_attn_residual", out=at + "ffn_norm")
            self.hook(layer, out=at + "post_ffn_residual")
            (self.hook_experts if is_moe(layer) else self.hook_dense)(at, layer.mlp)

    def put(self, name, rows):
        """Keeps `rows`, one per saved position, if the stage is wanted."""
        if (stage := name.rsplit(".", 1)[-1]) in self.wanted:
            dtype = torch.int32 if stage == "moe_router_indices" else torch.float32
            self.tensors[name] = rows.to(dtype).contiguous()

    def hook(self, module, into=None, out=None):
        """Records what goes into a module and what comes out, both [1, T, width], under these names."""

        def keep(_module, inputs, output):
            for name, value in ((into, inputs[0]), (out, output)):
                if name is not None:
                    self.put(name, value[0, self.rows])

        module.register_forward_hook(keep)

    def hook_attention(self, at, attention):
        plain, biased = {}, {}

        def project(part, module, inputs, out):
            order = lambda rows: self.file_order(rows, self.heads[part]) if part in self.heads else rows
            biased[part] = plain[part] = order(out[0, self.rows])
            if module.bias is not None:
                plain[part] = order(linear(inputs[0][0, self.rows], module.weight))
            if part == "v":
                self.put(at + "qkv_matmul", torch.cat([plain[p] for p in "qkv"], dim=-1))
                self.put(at + "qkv_bias", torch.cat([biased[p] for p in "qkv"], dim=-1))

        def trace(query, key, scaling, weights):
            """query [1, n_head, T, head_dim], key [1, n_head_kv, T, head_dim], weights [1, n_head, T, T] or None."""
            q, k = query[0][:, self.rows], key[0]
            for part, x in (("q", q), ("k", k[:, self.rows])):
                self.put(f"{at}{part}_post_rope", self.file_order(x.transpose(0, 1).flatten(1), self.heads[part]))
            if attention.trace_scores:
                scores = q @ k.repeat_interleave(attention.num_key_value_groups, dim=0).transpose(1, 2) * scaling
                beyond = torch.arange(k.shape[1]) > self.rows[:, None]
                self.put(at + "attn_scores", scores.masked_fill(beyond, 0).transpose(0, 1))
                self.put(at + "attn_softmax", weights[0][:, self.rows].transpose(0, 1))

        for part in "qkv":
            module = getattr(attention, part + "_proj")
            module.register_forward_hook(lambda m, i, out, part=part: project(part, m, i, out))
        attention.trace = trace
        self.hook(attention.o_proj, into=at + "attention", out=at + "attn_out")

    def hook_dense(self, at, mlp):
        self.hook(mlp.gate_proj, out=at + "ffn_gate")
        self.hook(mlp.up_proj, out=at + "ffn_up")
        self.hook(mlp.act_fn, out=at + "ffn_silu")
        self.hook(mlp.down_proj, into=at + "ffn_swigl", out=at + "ffn_out")

    def hook_experts(self, at, mlp):
        def route(module, inputs, out):
            # Early releases of transformers 5 return probabilities in the place of the logits.
            rows = linear(inputs[0].flatten(0, -2)[self.rows], module.weight), out[1][self.rows], out[2][self.rows]
            for stage, value in zip(ROUTER, rows, strict=True):
                self.put(at + stage, value)

        def experts(module, inputs):
            if self.wanted.isdisjoint(EXPERT):
                return
            x, chosen = inputs[0][self.rows], inputs[1][self.rows]
            n_embd, n_ff = module.down_proj.shape[1:]
            held = [x.new_empty(*chosen.shape, width) for width in (n_ff, n_ff, n_ff, n_embd)]
            # One expert at a time: gathering weights per token would copy an expert for every slot.
            for expert in chosen.unique():
                row, slot = torch.where(chosen == expert)
                gate, up = linear(x[row], module.gate_up_proj[expert]).chunk(2, dim=-1)
                hidden = silu(gate) * up
                out = linear(hidden, module.down_proj[expert])
                for stage, value in zip(held, (gate, up, hidden, out), strict=True):
                    stage[row, slot] = value
            for stage, value in zip(EXPERT, held, strict=True):
                self.put(at + stage, value)

        mlp.gate.register_forward_hook(route)
        mlp.experts.register_forward_pre_hook(experts)
        self.hook(mlp, out=at + "moe_ffn_out")


def is_moe(layer):
    return hasattr(layer.mlp, "experts")


def wanted_stages(named, model):
    """The stages to trace: those named, or all but the quadratic ones. A model may not have every stage."""
    layers = model.model.layers
    absent = {"qkv_bias"} if layers[0].self_attn.q_proj.bias is None else set()
    absent |= {*ROUTER, *EXPERT, "moe_ffn_out"} if not any(map(is_moe, layers)) else set()
    absent |= {*DENSE} if all(map(is_moe, layers)) else set()
    wanted = named or {*STAGES} - absent - {*SCORES}
    if unavailable := wanted & absent:
        present = ", ".join(stage for stage in STAGES if stage not in absent)
        fail(f"this model has no stage {', '.join(sorted(unavailable))}; it has {present}")
    return wanted


def token_ids(args, is_gguf):
    """The tokens of the pass, from whichever of the three options was given."""
    if args.prompt is not None and is_gguf:
        fail("--prompt needs a Hugging Face tokenizer; for a GGUF file give --tokens (apr tokenize prints the ids)")
    try:
        if args.prompt is not None:
            ids = transformers.AutoTokenizer.from_pretrained(args.model)(args.prompt).input_ids
        else:
            text = args.tokens if args.tokens is not None else Path(args.tokens_file).read_text()
            ids = [int(word) for word in re.split(r"[\s,]+", text) if word]
    except (OSError, ValueError) as error:
        fail(f"cannot read the tokens: {error}")
    return ids or fail("there are no tokens")


def saved_positions(text, n):
    """`all`, `last` or `A..B` (B exclusive) of `n` positions."""
    text = {"all": f"0..{n}", "last": f"{n - 1}..{n}"}.get(text, text)
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or not int(match[1]) < int(match[2]) <= n:
        fail(f"--positions is all, last or A..B with A < B <= {n} (B exclusive), not '{text}'")
    return list(range(int(match[1]), int(match[2])))


def stage_names(text):
    names = {name.strip().lower() for name in text.split(",")}
    if unknown := names.difference(STAGES):
        fail(f"unknown stage '{min(unknown)}'; the stages are {', '.join(STAGES)}")
    return names


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, a model folder, or a name on the Hugging Face hub")
    parser.add_argument("--out", required=True, help="the trace to write, a safetensors file")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--tokens", metavar="IDS", help="token ids: 1,2,3")
    tokens.add_argument("--tokens-file", metavar="FILE", help="a file of token ids between blanks or commas")
    tokens.add_argument("--prompt", metavar="TEXT", help="text for the model's own tokenizer (not for a GGUF file)")
    parser.add_argument("--positions", default="all", help="all (default), last, or A..B (B exclusive)")
    parser.add_argument(
        "--stages", metavar="A,B", type=stage_names,
        help="trace only these. Default: all the model has but attn_scores and attn_softmax, which hold a value per "
        f"head and pair of positions, and switch to eager attention. Stages: {', '.join(STAGES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and values (default float32)")
    args = parser.parse_args()
    if not Path(args.out).resolve().parent.is_dir():
        fail(f"there is no folder for {args.out}")
    return args


@torch.no_grad()
def main():
    args = arguments()
    if int(transformers.__version__.split(".")[0]) < 5:
        fail(f"needs transformers 5 or newer, found {transformers.__version__}")
    path, dtype, sha256 = Path(args.model), DTYPES[args.dtype], ""
    is_gguf = path.suffix == ".gguf" or path.is_file()
    ids = token_ids(args, is_gguf)
    positions = saved_positions(args.positions, len(ids))
    if is_gguf:
        source = GgufModel(path, dtype)
        model, arch = source.load(), source.arch
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        model, arch = load_folder(args.model, dtype)
    if outside := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        fail(f"token {outside[0]} is outside the vocabulary of {model.config.vocab_size}")
    wanted = wanted_stages(args.stages, model)
    recorder = Recorder(model, arch, wanted, positions)
    # The output matrix is the largest, so logits are computed for saved positions only, and only where wanted.
    head = {"logits_to_keep": recorder.rows} if "lm_head" in wanted else {}
    (model if head else model.model)(torch.tensor([ids]), use_cache=False, **head)
    metadata = {
        "format": "apr.trace/1", "device": "transformers", "isa": "", "precision": "f32", "kv": "f32", "fused": "false",
        "producer": f"transformers {transformers.__version__}" + (f" {args.dtype}" if dtype != torch.float32 else ""),
        "model": args.model, "model_sha256": sha256, "architecture": arch,
        "tokens": json.dumps(ids), "n_prompt": str(len(ids)), "positions": json.dumps(positions),
    }  # fmt: skip
    save_file(recorder.tensors, args.out, metadata=metadata)
    print(f"{args.out}: {len(recorder.tensors)} tensors, {len(positions)} of {len(ids)} positions")


if __name__ == "__main__":
    main()
