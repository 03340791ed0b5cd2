"""What measure.py found, in words and tables, and whether it is what was wanted."""

# The least that is asked of a GPU.
WANTED = {"roofline": 0.4, "over_compiled": 1.0, "over_naive": 10.0, "of_prediction": 0.85}


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value, form):
    return "-" if value is None else format(value, form)


def milliseconds(seconds):
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def verdicts(report):
    """What was wanted, what was found, and whether that is enough; nothing about what was not measured."""
    found = []

    def judge(what, value, least):
        if value is not None:
            found.append({"what": what, "found": value, "wanted": least, "reached": value >= least})

    one = {row["engine"]: row for row in report.get("speed") or [] if row["config"] == "gpt2-xl" and row["batch"] == 1}
    if "gpt2-burn" in one:
        judge("gpt2-xl, one row: part of the roofline", one["gpt2-burn"]["of_roofline"], WANTED["roofline"])
        if "PyTorch compiled" in one:
            ratio = one["PyTorch compiled"]["tpot_seconds"] / one["gpt2-burn"]["tpot_seconds"]
            judge("gpt2-xl, one row: speed over compiled PyTorch", ratio, WANTED["over_compiled"])
    for row in report.get("over_naive") or []:
        if row["config"] == "gpt2-large" and row["decoder"] == "kv-preallocated":
            judge("gpt2-large, 32 rows: cache over naive decoding", row["speedup_over_naive"], WANTED["over_naive"])
    ratios = [row["of_prediction"] for row in report.get("speculation") or [] if row["target"] == "gpt2-xl"]
    if ratios and None not in ratios:
        judge("gpt2-xl with gpt2: speculation, measured over predicted, the least", min(ratios), WANTED["of_prediction"])
    return found


def markdown(report):
    machine, parts = report["machine"], []
    peaks = machine.get("peaks")
    parts.append(f"# gpt2-burn on {peaks['name'] if peaks else report['device']}")
    parts.append(f"`{report['command']}`, commit {machine['commit']}, {machine['system']}, device `{report['device']}`, weights in {report['dtype']}.")
    if peaks:
        parts.append(f"Measured with PyTorch {peaks['torch']} (CUDA {peaks['cuda']}): memory at {peaks['bandwidth'] / 1e9:.0f} GB/s, the better of "
                     f"a copy and a sum; products at {peaks['flops'] / 1e12:.1f} TFLOP/s in {report['dtype']}. The roofline of a decode step is what "
                     "its weights and its cache take at the one, or its FLOPs at the other.")
    if report["failures"]:
        parts.append("## What failed\n\n" + "\n".join(f"- {failure}" for failure in report["failures"]))
    if report["verdicts"]:
        rows = [[v["what"], f"{v['found']:.2f}", f"{v['wanted']:.2f}", "yes" if v["reached"] else "**no**"] for v in report["verdicts"]]
        parts.append("## What was wanted\n\n" + table(["", "found", "at least", "reached"], rows))
    if tests := report.get("tests"):
        failed = ", ".join(f"`{name}`" for name in tests["failed"]) or "none"
        parts.append(f"## Tests on `{report['device']}`, in f32\n\n{tests['passed']} passed, failed: {failed}"
                     f" (tests/it/{{{','.join(tests['files'])}}}.rs)." + "".join(f"\n- skipped: {why}" for why in sorted(set(tests["skipped"]))))
    if rows := report.get("speed"):
        head = ["model", "rows", "engine", "TTFT ms", "TPOT ms", "(least to most)", "tokens/s", "of the roofline"]
        cells = [[r["config"], r["batch"], r["engine"], milliseconds(r["ttft_seconds"]), milliseconds(r["tpot_seconds"]),
                  " to ".join(map(milliseconds, r["tpot_spread"])), f"{r['tokens_per_second']:.1f}", number(r["of_roofline"], ".2f")] for r in rows]
        parts.append(f"## Speed\n\nPrompts of {rows[0]['prompt']} tokens and {rows[0]['new']} new ones, random weights in {report['dtype']}; medians of "
                     f"{rows[0]['runs']} runs, the engines in turns. PyTorch is transformers' GPT2LMHeadModel: eager with a growing cache, or a static "
                     "cache and a decode step compiled with `mode=\"reduce-overhead\"`.\n\n" + table(head, cells))
    if rows := report.get("over_naive"):
        first = rows[0]
        cells = [[r["decoder"] + (f" (from {r['sampled_steps']} steps)" if r["sampled_steps"] else ""), milliseconds(r["ttft_seconds"]),
                  milliseconds(r["tpot_seconds"]), f"{r['tokens_per_second']:.1f}", number(r["speedup_over_naive"], ".2f"), r["diverged_rows"]] for r in rows]
        parts.append(f"## Cache over naive decoding\n\n{first['config']}, {first['batch']} rows, prompts of {first['prompt_tokens']} tokens, {first['new_tokens']} "
                     "new ones.\n\n" + table(["decoder", "TTFT ms", "TPOT ms", "tokens/s", "over naive", "rows that differ"], cells))
    if rows := report.get("speculation"):
        keys = ["acceptance_rate", "tokens_per_round", "verification_cost", "draft_cost", "predicted_speedup", "measured_speedup", "of_prediction"]
        cells = [[r["draft_len"], *(number(r[key], ".2f") for key in keys)] for r in rows]
        head = ["drafted", "accepted", "tokens a round", "verification in steps", "a draft token in steps", "predicted", "measured", "of the prediction"]
        parts.append(f"## Speculation\n\n{rows[0]['target']} with a draft that costs what {rows[0]['draft']} costs and is right with a probability of 0.75 a "
                     "token; one row, against plain decoding with the cache.\n\n" + table(head, cells))
    if rows := report.get("divergence"):
        def first(row):
            d = row["first_divergence"]
            return "-" if d is None else f"row {d['row']}, step {d['step']}, margin {d['margin']:.2e}, logits within {d['max_logit_diff']:.2e}"
        cells = [[r["dtype"], r["cache_dtype"], r["decoder"], f"{r['diverged_rows']} of {r['batch']}", r["ties"], first(r)] for r in rows]
        parts.append("## Against naive decoding, token by token\n\nThe embedded pair; in f32 no row may differ.\n\n"
                     + table(["weights", "cache", "decoder", "rows that differ", "ties", "first difference"], cells))
    return "\n\n".join(parts) + "\n"
