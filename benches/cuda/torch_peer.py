"""PyTorch's side of the comparison: greedy decoding of a random GPT-2 with transformers' module, eager or compiled.

A process that builds its model once, says that it is ready, and then decodes once for each line that it reads, so that it
can take turns with others. `eager` has a growing cache; `compiled` a static one and a decode step under torch.compile with
`mode="reduce-overhead"`, which on a GPU is a CUDA graph. Both choose tokens on the device and wait for it only after the
first token and after the last.
"""

import argparse
import json
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache, StaticCache

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def peaks(device, dtype):
    """Bytes a second, of a copy (read and written) or of a sum, whichever are more, and FLOPs a second of large products."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    large = device.type == "cuda"

    def fastest(work, repeats):
        times = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    source = torch.ones(2**30 if large else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / fastest(lambda: target.copy_(source), 20)
    numbers = source.view(torch.float32)
    summed = source.numel() / fastest(numbers.sum, 20)
    bandwidth = max(copied, summed)
    size = 8192 if large else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / fastest(lambda: torch.matmul(a, b), 20)
    name = torch.cuda.get_device_name(device) if large else "CPU"
    return {"name": name, "bandwidth": bandwidth, "flops": flops, "torch": torch.__version__, "cuda": torch.version.cuda}


class Peer:
    def __init__(self, args):
        self.device = torch.device(args.device)
        self.new = args.new
        torch.manual_seed(1337)
        config = GPT2Config(**json.loads(args.shape))
        with torch.device(self.device):
            self.model = GPT2LMHeadModel(config).to(DTYPES[args.dtype]).eval()
        generator = torch.Generator().manual_seed(1337)
        prompts = torch.randint(config.vocab_size, (args.batch, args.prompt), generator=generator)
        self.prompts = prompts.to(self.device)
        self.static = None
        self.step = self.decode
        if args.mode == "compiled":
            # Its buffers stay where they are, or the graph would be captured again.
            self.static = StaticCache(config=config, max_cache_len=args.prompt + args.new)
            self.step = torch.compile(self.decode, mode="reduce-overhead", fullgraph=True)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def decode(self, tokens, cache):
        """The most likely next token of each row, `[batch, 1]`."""
        logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    @torch.no_grad()
    def run(self):
        cache = self.static
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache.reset()
        self.synchronize()
        start = time.perf_counter()
        token = self.decode(self.prompts, cache)
        self.synchronize()
        first = time.perf_counter()
        tokens = [token]
        for _ in range(self.new - 1):
            torch.compiler.cudagraph_mark_step_begin()
            # A graph's next replay writes where this one's result stands.
            token = self.step(token, cache).clone()
            tokens.append(token)
        ids = torch.cat(tokens, dim=1).tolist()
        end = time.perf_counter()
        tpot = (end - first) / (self.new - 1) if self.new > 1 else None
        return {"ttft_seconds": first - start, "tpot_seconds": tpot, "seconds": end - start, "ids": ids[0][:8]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["eager", "compiled", "peaks"], required=True)
    parser.add_argument("--shape", default="{}", help="of transformers' GPT2Config, as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="f16")
    for name, default in [("batch", 1), ("prompt", 128), ("new", 128), ("warmup", 3)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.mode == "peaks":
        return print(json.dumps(peaks(torch.device(args.device), DTYPES[args.dtype])))
    peer = Peer(args)
    for _ in range(args.warmup):
        peer.run()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(peer.run()), flush=True)


if __name__ == "__main__":
    main()
