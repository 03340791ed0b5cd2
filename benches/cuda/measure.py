"""Builds the library for a device, tests it there, measures it beside PyTorch, and writes report.md and report.json.

    benches/cuda/run
    benches/cuda/run --quick                                                        # small sizes, one round
    benches/cuda/run --device flex --torch-device cpu --dtype f32 --quick           # to try the script where no GPU is

Every part is measured even if one before it failed; what failed stands in the report, and the exit status is then 1.
Timings of the library are those that `compare` prints, with its warm-up; rounds of the engines alternate.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import markdown, verdicts

ROOT = Path(__file__).resolve().parents[2]
# What the tests of these modules compute depends on the device.
TESTS = ["devices", "pipelines"]
PARTS = ["build", "tests", "speed", "over_naive", "speculation", "divergence"]
SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
VOCABULARY, POSITIONS = 50257, 1024
BYTES = {"f32": 4, "f16": 2, "bf16": 2}  # a weight


class Failed(Exception):
    """A part of the report that could not be had, and why."""


def call(command, env=None, accept=(0,), errors=subprocess.PIPE):
    """Runs a command to its end; with `errors=subprocess.STDOUT`, standard error is among its output."""
    command = list(map(str, command))
    print("$", " ".join(command), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=errors, text=True)
    except OSError as error:
        raise Failed(f"`{command[0]}`: {error}") from None
    if done.returncode not in accept:
        raise Failed(f"`{' '.join(command[:3])} ...` ended with {done.returncode}: {last_words(done)}")
    return done


def last_words(done):
    return " ".join(((done.stderr or "").strip() or done.stdout.strip()).splitlines()[-3:])


# The library


def cargo(args, *words):
    return ["cargo", *words, "--release", "--no-default-features", "--features", args.features]


def commit():
    try:
        return call(["git", "describe", "--always", "--dirty"]).stdout.strip()
    except Failed:
        return "unknown"


def build(args):
    start = time.monotonic()
    call([*cargo(args, "build"), "--package", "gpt2-burn-cli", "--package", "gpt2-burn-examples", "--bin", "gpt2", "--example", "cuda"])
    return {"seconds": time.monotonic() - start, "features": args.features}


def tests(args):
    """Results of the tests, on the device in f32."""
    command = [*cargo(args, "test"), "--no-fail-fast", "--workspace", "--exclude", "gpt2-burn-onnx-witness"]
    device, output = {"GPT2_BURN_TEST_DEVICE": args.device}, ""
    for words in (["--lib"], ["--test", "it", "--", *(f"{name}::" for name in TESTS)]):
        output += call([*command, *words], device, accept=(0, 101), errors=subprocess.STDOUT).stdout
    results = re.findall(r"^test (\S+) \.\.\. (ok|FAILED|ignored)", output, re.MULTILINE)
    if not results:
        raise Failed("no test ran")
    failed = [name for name, result in results if result == "FAILED"]
    passed = sum(result == "ok" for _, result in results)
    # Tests that find something missing say so, and pass.
    return {"passed": passed, "skipped": re.findall(r"SKIPPED: (.*)", output), "failed": failed, "files": TESTS}


def compare(args, *options, dtype=None):
    """Rows that `compare` prints; other tokens than naive decoding's are a row's affair, not a failure."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    program = target / "release" / "gpt2"
    done = call([program, "compare", "--json", "--device", args.device, "--dtype", dtype or args.dtype, *options], accept=(0, 1))
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise Failed(f"`compare {' '.join(map(str, options))}`: {last_words(done)}") from None


# The measurements


def divergence(args):
    """How far from naive decoding's tokens half precision leads, with the embedded model."""
    sizes = ["--batch-size", 2, "--prompt-length", 16, "--max-new-tokens", 8] if args.quick else ["--batch-size", 16]
    rows = []
    for dtype in dict.fromkeys(["f32", args.dtype]):
        rows += compare(args, *sizes, "--num-samples", 1, "--draft", "embedded", dtype=dtype)
    keys = ["decoder", "dtype", "cache_dtype", "kernels", "batch", "new_tokens", "equal", "ties", "diverged_rows", "first_divergence"]
    return [{key: row[key] for key in keys} for row in rows if row["decoder"] != "naive"]


def ours(args, case):
    row = compare(args, "--config", case["config"], "--batch-size", case["batch"], "--prompt-length", case["prompt"],
                  "--max-new-tokens", case["new"], "--decoders", "kv-preallocated", "--num-samples", 1)[0]
    return {key: row[key] for key in ("ttft_seconds", "tpot_seconds", "seconds")}


class Torch:
    """A process of PyTorch's that decodes when it is told to."""

    def __init__(self, args, case, mode):
        shape = {**SHAPES[case["config"]], "vocab_size": VOCABULARY, "n_positions": POSITIONS}
        words = [args.python, Path(__file__).with_name("torch_peer.py"), "--mode", mode, "--shape", json.dumps(shape), "--device",
                 args.torch_device, "--dtype", args.dtype, "--batch", case["batch"], "--prompt", case["prompt"], "--new", case["new"]]
        self.process = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()  # built, compiled and warm

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"PyTorch ended with {self.process.wait()}")
        return json.loads(line)

    def run(self):
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: there is no answer
        return self.answer()

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()


def speed(args, case, failures):
    """One size and batch, all engines in turns."""
    engines, peers, runs = {"gpt2-burn": lambda: ours(args, case)}, [], {}
    try:
        for mode in [] if args.no_torch else ["eager", "compiled"]:
            try:
                peers.append(Torch(args, case, mode))
                engines[f"PyTorch {mode}"] = peers[-1].run
            except Failed as error:
                failures.append(f"PyTorch {mode}, {case['config']}, batch {case['batch']}: {error}")
        for turn in range(args.rounds):
            for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
                try:
                    found = engines[name]()
                    runs.setdefault(name, []).append(found)
                except Failed as error:
                    failures.append(f"{name}, {case['config']}, batch {case['batch']}: {error}")
                    del engines[name]
    finally:
        for peer in peers:
            peer.close()
    return [row(args, case, name, runs[name]) for name in ["gpt2-burn", "PyTorch eager", "PyTorch compiled"] if name in runs]


def row(args, case, name, runs):
    """Medians of an engine's runs, and its part of the roofline."""
    ttft, tpot, seconds = (statistics.median(run[key] for run in runs) for key in ("ttft_seconds", "tpot_seconds", "seconds"))
    spread = [min(run["tpot_seconds"] for run in runs), max(run["tpot_seconds"] for run in runs)]
    rate = case["batch"] * case["new"] / seconds
    floor = roofline(args, case)
    return {**case, "engine": name, "runs": len(runs), "ttft_seconds": ttft, "tpot_seconds": tpot, "tpot_spread": spread,
            "tokens_per_second": rate, "roofline_seconds": floor, "of_roofline": floor and floor / tpot}


def roofline(args, case):
    """Seconds of a decode step, if only bytes or only products took time: all weights and the middle step's cache are read once."""
    if not args.peaks:
        return None
    layers, width = (SHAPES[case["config"]][key] for key in ("n_layer", "n_embd"))
    matrices = 12 * layers * width**2 + VOCABULARY * width
    length = case["prompt"] + case["new"] / 2
    cache = 2 * layers * width * length * case["batch"]
    read = (matrices + cache) * BYTES[args.dtype]
    flops = 2 * case["batch"] * (matrices + 2 * layers * width * length)
    return max(read / args.peaks["bandwidth"], flops / args.peaks["flops"])


def over_naive(args):
    """The assignment's setting."""
    config, batch, tokens = ("gpt2", 1, 8) if args.quick else ("gpt2-large", 32, 128)
    rows = compare(args, "--config", config, "--batch-size", batch, "--prompt-length", tokens, "--max-new-tokens", tokens,
                   "--decoders", "naive,kv-growing,kv-preallocated", "--num-samples", 1 if args.quick else 3)
    keys = ["decoder", "batch", "prompt_tokens", "new_tokens", "ttft_seconds", "tpot_seconds", "tokens_per_second",
            "speedup_over_naive", "sampled_steps", "equal", "ties", "diverged_rows"]
    return [{"config": config, **{key: row[key] for key in keys}} for row in rows]


def speculation(args):
    """A draft that is right three times out of four, and costs what gpt2 costs."""
    target, draft = ("gpt2", "gpt2") if args.quick else ("gpt2-xl", "gpt2")
    sizes = ["--prompt-length", 8, "--max-new-tokens", 16] if args.quick else ["--max-new-tokens", 128]
    found = []
    for draft_len in [2] if args.quick else [2, 3, 4, 5]:
        rows = compare(args, "--mode", "latency", "--config", target, "--draft-config", draft, "--agreement", 0.75, "--draft-len",
                       draft_len, "--decoders", "kv-preallocated,speculative", "--num-samples", 1 if args.quick else 3, *sizes)
        figures = next(row["speculation"] for row in rows if row["decoder"] == "speculative")
        keys = ["acceptance_rate", "tokens_per_round", "verification_cost", "draft_cost", "predicted_speedup", "measured_speedup"]
        ratio = figures["measured_speedup"] and figures["predicted_speedup"] and figures["measured_speedup"] / figures["predicted_speedup"]
        found.append({"target": target, "draft": draft, "draft_len": draft_len, **{key: figures.get(key) for key in keys},
                      "of_prediction": ratio})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="of the library: cuda, cuda:1, flex, ...")
    parser.add_argument("--torch-device", help="of PyTorch; default: cuda, or cpu for flex and ndarray")
    parser.add_argument("--dtype", default="f16", choices=["f32", "f16", "bf16"], help="of the weights")
    parser.add_argument("--features", help="of the library; default: those that the device needs")
    parser.add_argument("--configs", default="gpt2,gpt2-large,gpt2-xl", help="sizes of the table, with commas between them")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="with torch and transformers")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda"), help="folder of the report")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--no-torch", action="store_true", help="without PyTorch: then there is no roofline either")
    parser.add_argument("--quick", action="store_true", help="gpt2 alone, few tokens, one round: to see that everything runs")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}: not {', '.join(sorted(unknown))}")
    if unknown := set(args.configs.split(",")) - set(SHAPES):
        parser.error(f"--configs knows {', '.join(SHAPES)}: not {', '.join(sorted(unknown))}")
    if args.new < 2 or args.prompt < 1 or args.rounds < 1:
        parser.error("at least 2 new tokens, a prompt of 1 and 1 round are needed")
    kind = args.device.split(":")[0]
    if args.quick:
        args.configs, args.batches, args.prompt, args.new, args.rounds = "gpt2", "1,2", 8, 8, 1
    args.torch_device = args.torch_device or ("cpu" if kind in ("flex", "ndarray") else args.device)
    args.features = args.features or ",".join(dict.fromkeys([kind, "flex"]))

    report = {"command": " ".join(["benches/cuda/run", *sys.argv[1:]]), "device": args.device, "dtype": args.dtype, "failures": []}
    machine = {"system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors", "commit": commit()}
    report["machine"], args.peaks, parts = machine, None, args.only.split(",")

    def part(name, work):
        try:
            return work()
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr)
            report["failures"].append(f"{name}: {error}")
            return None

    if not args.no_torch:
        peer = Path(__file__).with_name("torch_peer.py")
        words = [args.python, peer, "--mode", "peaks", "--device", args.torch_device, "--dtype", args.dtype]
        machine["peaks"] = args.peaks = part("peaks", lambda: json.loads(call(words).stdout))
    if "build" in parts:
        report["build"] = part("build", lambda: build(args))
    if "tests" in parts:
        report["tests"] = part("tests", lambda: tests(args))
        report["failures"] += [f"test {name}" for name in (report["tests"] or {}).get("failed", [])]
    if "speed" in parts:
        sizes = [(config, int(batch)) for config in args.configs.split(",") for batch in args.batches.split(",")]
        cases = [{"config": config, "batch": batch, "prompt": args.prompt, "new": args.new} for config, batch in sizes]
        report["speed"] = [row for case in cases for row in speed(args, case, report["failures"])]
    for name, work in [("over_naive", over_naive), ("speculation", speculation), ("divergence", divergence)]:
        if name in parts:
            report[name] = part(name, lambda: work(args))
    exact = [row for row in report.get("divergence") or [] if row["dtype"] == "f32" and not row["equal"]]
    report["failures"] += [f"{row['decoder']} gave other tokens than naive decoding in f32" for row in exact]
    report["verdicts"] = verdicts(report)
    report["failures"] += [f"wanted: {v['what']}: {v['found']:.2f}, not {v['wanted']:.2f}" for v in report["verdicts"] if not v["reached"]]

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "report.md").write_text(markdown(report))
    print((args.out / "report.md").read_text())
    sys.exit(1 if report["failures"] else 0)


if __name__ == "__main__":
    main()
