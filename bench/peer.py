"""Measures llama.cpp, as the wheel `xllamacpp` packs it: one model, one workload, one setting, in a process of its own.

    python peer.py MODEL '{"kind": "tg", "n": 64, "batch": 1, "depth": 0, "threads": 2, "repack": true, "fa": 0, ...}'

bench/compare and bench/serve-load start it. stdout is one JSON object, or nothing where it serves; what llama.cpp says goes to stderr.
"""

import json
import os
import random
import sys
import threading
import time


def peak_rss_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def start_server(xl, model, job):
    p = xl.CommonParams()
    p.model.path = model
    p.n_parallel = job["batch"]
    # A prompt has a token at least, and an answer one that is not counted.
    p.n_ctx = max(512, job["depth"] + job["n"] + 64) * job["batch"]
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = job["threads"]
    p.no_extra_bufts = not job["repack"]
    fa = xl.llama_flash_attn_type
    p.flash_attn_type = (
        fa.LLAMA_FLASH_ATTN_TYPE_ENABLED if job["fa"] else fa.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    # A start is measured without what only later requests gain from, and without what looks for room on GPUs.
    p.warmup = job["kind"] != "load"
    p.fit_params = False
    # Prompts are kept in the slots that had them, not copied beside.
    p.cache_ram_mib = 0
    return xl.Server(p)


def serve(xl, model, job):
    """Answers over HTTP, with llama.cpp's own defaults, until the process is ended."""
    p = xl.CommonParams()
    p.model.path = model
    p.n_parallel, p.n_ctx, p.port = job["parallel"], job["parallel"] * job["ctx"], job["port"]
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = job["threads"]
    # What looks for room on GPUs.
    p.fit_params = False
    server = xl.Server(p)
    print(server.listening_address, file=sys.stderr)
    threading.Event().wait()


def complete(server, prompt, n, keep):
    request = {"prompt": prompt, "max_tokens": n, "temperature": 0.0, "ignore_eos": True, "cache_prompt": keep}
    answer = server.handle_completions(request)
    if "timings" not in answer:
        raise RuntimeError(f"llama.cpp answered {answer}")
    return answer["timings"]


def prefill(server, job, tokens):
    """Tokens per second of prompts that go on from a context, which the server keeps."""
    context = tokens(job["depth"])
    if context:
        complete(server, context, 1, True)
    rates = []
    for _ in range(job["reps"] + 1):
        timings = complete(server, context + tokens(job["n"]), 1, bool(context))
        if abs(timings["prompt_n"] - job["n"]) > 1:
            raise RuntimeError(f"llama.cpp computed {timings['prompt_n']} tokens of a prompt, expected {job['n']}")
        rates.append(timings["prompt_per_second"])
    return rates


def steps_per_second(timings):
    """The first token comes with the prompt, and llama.cpp's clock starts behind it."""
    return (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3


def decode(server, job, tokens):
    """Tokens per second of all sequences: the sum of their rates, in llama.cpp's favour where they do not quite overlap."""
    prompts = [tokens(max(1, job["depth"])) for _ in range(job["batch"])]
    rates = []
    for _ in range(job["reps"] + 1):
        each = []
        ask = lambda prompt: each.append(steps_per_second(complete(server, prompt, job["n"] + 1, True)))
        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        [t.start() for t in threads], [t.join() for t in threads]
        if len(each) != len(prompts):
            raise RuntimeError("a request to llama.cpp failed")
        rates.append(sum(each))
    return rates


def main():
    model, job = sys.argv[1], json.loads(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp as xl

    if job["kind"] == "serve":
        return serve(xl, model, job)
    rng = random.Random(1)
    tokens = lambda n: [rng.randrange(job["n_vocab"]) for _ in range(n)]
    start = time.monotonic()
    server = start_server(xl, model, job)
    if job["kind"] == "load":
        # Counted from behind the start of Python and the import, which are not llama.cpp's.
        complete(server, tokens(1), 1, False)
        result = {"seconds": time.monotonic() - start}
    else:
        rates = sorted((prefill if job["kind"] == "pp" else decode)(server, job, tokens)[1:])
        result = {"tok_per_s": rates[len(rates) // 2]}
    result.update(peak_rss_bytes=peak_rss_bytes(), version=f"xllamacpp {xl.__version__}")
    print(json.dumps(result), file=out, flush=True)
    # Nothing is gained from taking the server down in order.
    os._exit(0)


if __name__ == "__main__":
    main()
