"""Measures PyTorch on the operations that benches/kernels has measured.

    peers.py KERNELS.json [SECONDS]

KERNELS.json is the list `kernels` of that bench's JSON. Prints JSON: the limits of the GPU in
PyTorch, and the list. Each operation gets its share of the limit of matrix products, and the
times of PyTorch's equivalents, fastest first. After SECONDS, no further equivalent is measured.
"""

import json
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    print(json.dumps({"left_out": "PyTorch is not installed"}))
    sys.exit()
if not torch.cuda.is_available():
    print(json.dumps({"left_out": "PyTorch finds no GPU"}))
    sys.exit()

# Bytes of all operands: more than the L2 cache has, so that they must be read from memory.
WORKING_SET = 512 << 20
SAMPLES = 15
# Seconds of work before the first sample, because the clocks of an idle GPU are slow.
WARM_UP = 0.05
# FlashAttention-2, and NVIDIA's kernels, which are faster on Hopper and later GPUs.
ATTENTION = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def seconds(work, repeats=1):
    """Returns the median time of an operation in seconds. `work` runs the operation `repeats`
    times, and is recorded as a CUDA graph if possible."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
        stream.synchronize()
        launch = work
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                work()
            launch = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
        begin = time.monotonic()
        while time.monotonic() < begin + WARM_UP:
            launch()
            stream.synchronize()
        times = []
        for _ in range(SAMPLES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            launch()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / repeats


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def copies(size):
    return max(1, min(32, -(-WORKING_SET // size)))


def linear(row):
    outputs, inputs, rows = row["sizes"]["outputs"], row["sizes"]["inputs"], row["rows"]
    count = copies(outputs * inputs * 2)
    if rows > 64:
        count = min(count, 4)
    weights = [random(outputs, inputs) for _ in range(count)]
    x, out = random(rows, inputs), torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)
    what = "cuBLAS" if "BF16" in row["kernel"] else "cuBLAS with bfloat16 weights"
    return {what: seconds(lambda: [torch.matmul(x, weight.T, out=out) for weight in weights], count)}


def norm(row):
    columns, rows = row["sizes"]["columns"], row["rows"]
    count = copies(rows * columns * 12)
    weight = random(columns)
    inputs = [random(rows, columns) for _ in range(count)]
    if row["kernel"] == "rms_norm":
        work = lambda: [F.rms_norm(x, (columns,), weight, 1e-5) for x in inputs]
        return {"F.rms_norm in bfloat16": seconds(work, count)}
    residuals = [random(rows, columns) for _ in range(count)]
    work = lambda: [F.rms_norm(r.add_(x), (columns,), weight, 1e-5) for r, x in zip(residuals, inputs)]
    return {"add_ and F.rms_norm in bfloat16": seconds(work, count)}


def activation(row):
    columns, rows = row["sizes"]["columns"], row["rows"]
    count = copies(rows * columns * 6)
    inputs = [random(rows, 2 * columns) for _ in range(count)]

    def work():
        for x in inputs:
            gate, up = x.chunk(2, dim=-1)
            F.silu(gate) * up

    return {"F.silu and a product": seconds(work, count)}


def attention(row):
    sizes = row["sizes"]
    sequences, new, tokens = sizes["sequences"], sizes["new"], sizes["tokens"]
    q_heads, kv_heads, head_dim = sizes["q_heads"], sizes["kv_heads"], sizes["head_dim"]
    count = min(copies(sequences * tokens * kv_heads * head_dim * 4), 8)
    q = random(sequences, q_heads, new, head_dim)
    caches = [(random(sequences, kv_heads, tokens, head_dim), random(sequences, kv_heads, tokens, head_dim)) for _ in range(count)]
    # New tokens attend to the cached ones; PyTorch's causal mask is aligned to the first token.
    mask = None
    if 1 < new < tokens:
        mask = torch.ones(new, tokens, device="cuda", dtype=torch.bool).tril(tokens - new)
    causal = new == tokens

    def work():
        for k, v in caches:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)

    found = {}
    for backend, which in ATTENTION.items():
        try:
            with sdpa_kernel(which):
                found[f"{backend}, not paged"] = seconds(work, count)
        except RuntimeError as error:
            # The backend does not support this shape, mask or GPU.
            print(f"{row['kernel']} {row['shape']}: {backend}: {error}", file=sys.stderr)
            torch.cuda.synchronize()
    return found or {"F.scaled_dot_product_attention, not paged": seconds(work, count)}


def sampling(row):
    columns, rows = row["sizes"]["columns"], row["rows"]
    logits = random(rows, columns, dtype=torch.float32)
    if row["kernel"] == "sample greedy":
        return {"argmax": seconds(lambda: logits.argmax(-1))}
    if row["kernel"] == "sample plain":
        draw = lambda: (logits / 0.8).softmax(-1).div_(torch.empty_like(logits).exponential_()).argmax(-1)
        return {"softmax and exponential trick": seconds(draw)}

    def nucleus():
        values, order = (logits / 0.8).sort(-1, descending=True)
        probabilities = values.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities > 0.95] = 0
        choice = probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        return order.gather(-1, choice)

    return {"sort, cumsum and exponential trick": seconds(nucleus)}


def peers(row):
    """Returns the times in seconds of PyTorch's equivalents of an operation, by name."""
    kernel = row["kernel"]
    if kernel.startswith("linear"):
        return linear(row)
    if kernel in ("rms_norm", "add_rms_norm"):
        return norm(row)
    if kernel == "gated_activation":
        return activation(row)
    if kernel.startswith("attend"):
        return attention(row)
    if kernel.startswith("sample"):
        return sampling(row)
    return {}


def limits():
    """Returns the TFLOP/s of a large random matrix product and the TB/s of a large copy."""
    size = 8192
    a, b = random(size, size), random(size, size)
    product = 2 * size**3 / seconds(lambda: torch.matmul(a, b))
    source = torch.empty(2 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source))
    return product / 1e12, copy / 1e12


def main():
    begin = time.monotonic()
    rows = json.load(open(sys.argv[1]))
    end = begin + float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    torch.manual_seed(1)
    matmul, copy = limits()
    torch.cuda.empty_cache()
    known = {}
    for row in rows:
        row["share_of_matmul"] = row["tflop_per_s"] / matmul
        # Products with quantised weights have the same peer as those with bfloat16 weights.
        linear = row["kernel"].startswith("linear") and "BF16" not in row["kernel"]
        kernel = "linear" if linear else row["kernel"]
        key = json.dumps([kernel, row["rows"], row["sizes"]])
        if key not in known and time.monotonic() < end:
            try:
                known[key] = peers(row)
            except (RuntimeError, TypeError) as error:
                print(f"{row['kernel']}: {error}", file=sys.stderr)
                known[key] = {}
            torch.cuda.empty_cache()
        found = sorted(known.get(key, {}).items(), key=lambda peer: peer[1])
        row["peers"] = [{"what": what, "microseconds": taken * 1e6} for what, taken in found]
    limit = {"version": torch.__version__, "matmul_tflop_per_s": matmul, "copy_tb_per_s": copy}
    print(json.dumps({"pytorch": limit, "kernels": rows}))


if __name__ == "__main__":
    main()
