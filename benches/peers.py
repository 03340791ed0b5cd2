"""This library beside other engines: the same checkpoint and batch, in turns, each run in a process of its own.

    cargo build --release -p gpt2-burn-cli
    python benches/peers.py --ours DIR:f32 --openvino DIR --llama BIN:FILE.gguf --torch DIR --batch 1 --prompt 512 --new 64

--ours     a checkpoint in Hugging Face's layout and f32, f16, bf16 or int8
--openvino what `optimum-cli export openvino --task text-generation-with-past --weight-format fp32|int8` made of it
--llama    the program llama-batched-bench, and what llama.cpp's convert_hf_to_gguf.py made of the checkpoint
--torch    the checkpoint, for transformers

Each can be given more than once; the first is what the others are compared with. Needs only the packages of the engines
that are named. Speed does not depend on the weights: a random model of the right shape will do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPEATS = 3


def ids(args):
    return [[((i + 1) * 7919 + row * 104729 + 13) % 50256 for i in range(args.prompt)] for row in range(args.batch)]


def timed(generate, args):
    """Seconds to the first token, seconds for each further one, and the peak of the process in MB."""
    import resource

    def seconds(new):
        generate(new)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            generate(new)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    first = seconds(1)
    step = (seconds(args.new) - first) / (args.new - 1)
    return first, step, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def torch(path, args):
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(args.threads)
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    rows = torch.tensor(ids(args))
    options = {"attention_mask": torch.ones_like(rows), "do_sample": False, "pad_token_id": 50256}
    with torch.inference_mode():
        return timed(lambda new: model.generate(rows, max_new_tokens=new, **options), args)


def openvino(path, args):
    import numpy
    import openvino
    import openvino_genai as genai

    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": args.threads,
               "ATTENTION_BACKEND": "SDPA", "PERFORMANCE_HINT": "LATENCY"}
    pipeline = genai.LLMPipeline(path, "CPU", options)
    rows = numpy.array(ids(args), dtype=numpy.int64)
    tokens = genai.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(numpy.ones_like(rows)))

    def generate(new):
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        pipeline.generate(tokens, config)

    return timed(generate, args)


def llama(paths, args):
    program, model = paths.rsplit(":", 1)
    context = args.batch * (args.prompt + args.new)
    flash = "on" if args.batch > 1 else "off"  # what is faster
    command = [program, "-m", model, "-npp", str(args.prompt), "-ntg", str(args.new), "-npl", str(args.batch), "-c", str(context),
               "-b", str(context), "-ub", str(context), "-t", str(args.threads), "-fa", flash, "--output-format", "jsonl"]
    runs = []
    for _ in range(REPEATS):
        # The peak is that of the child, as the system reports it to those who wait for it.
        wrapped = ["/usr/bin/env", "python3", "-c", WAIT, *command]
        lines = subprocess.run(wrapped, capture_output=True, text=True, check=True).stdout.splitlines()
        row = next(json.loads(line) for line in lines if line.startswith("{"))
        runs.append((row["t_pp"], row["t_tg"] / args.new, float(lines[-1])))
    return tuple(statistics.median(column) for column in zip(*runs))


WAIT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def ours(path, args):
    folder, dtype = path.rsplit(":", 1)
    program = Path(__file__).parent.parent / "target/release/gpt2"
    options = {"--model": folder, "--dtype": dtype, "--batch-size": args.batch, "--prompt-length": args.prompt,
               "--max-new-tokens": args.new, "--num-samples": REPEATS, "--threads": args.threads, "--decoders": "kv-preallocated"}
    command = [str(program), "compare", "--json", *(str(word) for option in options.items() for word in option)]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]
    return row["ttft_seconds"], row["tpot_seconds"], row["peak_bytes"] / 2**20


ENGINES = {"ours": ours, "openvino": openvino, "llama": llama, "torch": torch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ENGINES:
        parser.add_argument(f"--{name}", dest="runs", action="append", default=argparse.SUPPRESS,
                            type=lambda path, name=name: (name, path))
    for name, default in [("batch", 1), ("prompt", 32), ("new", 64), ("threads", 2), ("rounds", 5)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--python", default=[], action="append", metavar="ENGINE=PROGRAM",
                        help="another interpreter for one engine, if its packages live elsewhere")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(ENGINES[args.one[0]](args.one[1], args)))

    interpreters = dict(choice.split("=", 1) for choice in args.python)
    sizes = [word for name in ("batch", "prompt", "new", "threads") for word in (f"--{name}", str(getattr(args, name)))]
    found = {run: [] for run in args.runs}
    for turn in range(args.rounds):
        for run in args.runs[:: 1 if turn % 2 == 0 else -1]:
            command = [interpreters.get(run[0], sys.executable), __file__, *sizes, "--one", *run]
            output = subprocess.run(command, capture_output=True, text=True)
            if output.returncode != 0:
                sys.exit(f"{run}: {output.stderr}")
            found[run].append(json.loads(output.stdout.splitlines()[-1]))
    print(f"batch {args.batch}, prompt {args.prompt}, {args.new} new tokens, {args.rounds} rounds, medians")
    print("| | tokens/s | first token s | peak MB | speed of the first to it: decode | prefill |\n|---|---|---|---|---|---|")
    for run, rows in found.items():
        first, step, peak = (statistics.median(column) for column in zip(*rows))
        ratios = [(other[1] / own[1], other[0] / own[0]) for own, other in zip(found[args.runs[0]], rows)]
        decode, prefill = (statistics.median(column) for column in zip(*ratios))
        name = f"{run[0]} {Path(run[1]).name}"
        print(f"| {name} | {args.batch / step:.1f} | {first:.3f} | {peak:.0f} | {decode:.2f} | {prefill:.2f} |")


if __name__ == "__main__":
    main()
