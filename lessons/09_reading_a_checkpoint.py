# %% [markdown]
# # 09 · Reading a checkpoint that is bigger than memory
#
# ## The question
#
# A 7B model is a file of 13.48 GB, and 3.87 GB in 4 bits. Your machine has 8. Can you make the second from the first on it?

# %%
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch

import minilora
from minilora import load_model
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.llama.config import LlamaConfig, linear_parameters, num_parameters
from minilora.llama.safetensors_file import map_tensor, read_header, read_tensor
from minilora.llama.weights import WeightFiles
from minilora.shapes import shape_of, write_random_checkpoint

# %% [markdown]
# ## What is in the file
#
# A safetensors file is 8 bytes, a piece of JSON, and numbers. That is all of it.

# %%
tiny = Path(minilora.__file__).parent / "assets" / "tiny" / "model.safetensors"
with tiny.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
key = "model.layers.0.self_attn.q_proj.weight"
print(f"{tiny.stat().st_size:,} bytes, of which the header takes {8 + length:,}")
print(key, header[key])

# %% [markdown]
# The offsets count from the end of the header. So one tensor is a `seek` and a `read`, whatever else is in the file:

# %%
start, stop = header[key]["data_offsets"]
with tiny.open("rb") as file:
    file.seek(8 + length + start)
    raw = bytearray(file.read(stop - start))
weight = torch.frombuffer(raw, dtype=torch.bfloat16).view(header[key]["shape"])
assert torch.equal(weight, read_tensor(read_header(tiny)[key]))
print(f"read {len(raw):,} of {tiny.stat().st_size:,} bytes: a weight of shape {tuple(weight.shape)}")

# %% [markdown]
# ## One tensor at a time
#
# Read a tensor, quantize it, drop the 16-bit form, read the next. In memory are the 4-bit tensors so far, and one in 16
# bits; two where the next is read while one is quantized, as the package does.
#
# **Predict.** The checkpoint of this cell has 368 MB in 16 bits, and about a quarter of that in 4. By how much does a
# process grow that (a) loads all of it and then quantizes, (b) goes tensor by tensor?

# %%
shape = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 14, "num_attention_heads": 16,
         "num_key_value_heads": 16, "intermediate_size": 2816, "vocab_size": 4096, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
ways = {
    "all at once": """
        from safetensors.torch import load_file
        tensors = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors.update({key: tensor.clone() for key, tensor in load_file(shard).items()})
        kept = {key: minilora.quantize_nf4(tensor) if "proj" in key else tensor for key, tensor in tensors.items()}""",
    "one by one": """
        kept = minilora.load_model(folder)""",
}
program = """
    import sys
    from pathlib import Path
    import torch, minilora
    from minilora.runs import peak_bytes
    folder, cpu = Path(sys.argv[1]), torch.device("cpu")
    minilora.quantize_nf4(torch.ones(1 << 16)).dequantize()         # compiled and loaded before we look
    before = peak_bytes(cpu)
"""
grown = {}
with tempfile.TemporaryDirectory() as place:
    folder = Path(place)
    size = write_random_checkpoint(LlamaConfig.from_dict(shape), folder, shard_bytes=1 << 27)
    for name, way in ways.items():
        script = textwrap.dedent(program) + textwrap.dedent(way) + textwrap.dedent("""
            print(peak_bytes(cpu) - before)""")
        done = subprocess.run([sys.executable, "-c", script, place], capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout)
    model = load_model(folder)
stored = sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for p in model.parameters())
print(f"on disk {size / 1e6:.0f} MB, in 4 bits {stored / 1e6:.0f} MB")
for name, peak in grown.items():
    print(f"{name:12s} grew by {peak / 1e6:.0f} MB at its peak")
assert 360e6 < size < 400e6 and grown["one by one"] < 0.6 * grown["all at once"]

# %% [markdown]
# One by one the peak is the result and a little, the two tensors; the 16-bit model never stands in memory. That is what lets
# a 7B model pass through a machine of 8 GB.
#
# There is one catch. A tensor need not be copied to be read: it can be *mapped*, and is quantized as it lies in the file. But
# a map counts as yours, page by page, as it is touched. Who maps the whole file has the whole file in the end. So the package
# maps a tensor at a time, and lets it go while the next is read. Only what is kept gets memory of its own.

# %%
assert torch.equal(map_tensor(read_header(tiny)[key]), weight)
print({name: f"{peak / size:.2f} of the file" for name, peak in grown.items()})
seven_b = shape_of("7b")
in_16, in_linears = 2 * num_parameters(seven_b) / 1e9, linear_parameters(seven_b)
in_4 = (in_linears * 4.127 / 8 + 2 * (num_parameters(seven_b) - in_linears)) / 1e9
print(f"a 7B model: {in_16:.2f} GB in 16 bits, {in_4:.2f} in 4")
assert (round(in_16, 2), round(in_4, 2)) == (13.48, 3.87)

# %% [markdown]
# ## The picture

# %%
names = [name for name in header if name != "__metadata__"]
sizes = [header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names]
in_four_bits = [size * 4.127 / 16 if "proj" in name else size for name, size in zip(names, sizes, strict=True)]
whole, streamed, so_far = [], [], 0.0
for index, size in enumerate(sizes):
    whole.append(sum(sizes[: index + 1]) / 1e6)
    so_far += in_four_bits[index]
    streamed.append((so_far + (size if "proj" in names[index] else 0)) / 1e6)
with picture("09_streaming", width=6.5, height=3.2) as axes:
    axes.plot(whole, color=RED, linewidth=2, label="everything in 16 bits")
    axes.plot(streamed, color=BLUE, linewidth=2, label="quantized so far, and one tensor in 16 bits")
    axes.axhline(sum(in_four_bits) / 1e6, color=GREY, linestyle="--", label="the result")
    axes.set(xlabel="tensors read", ylabel="MB", title="in memory while the small model is read", ylim=(0, None))
    axes.legend()

# %% [markdown]
# ![megabytes in memory over the tensors read, for both ways](figures/09_streaming.png)
#
# ## Where it lives
#
# `minilora/llama/safetensors_file.py` is the format, `minilora/llama/weights.py` finds tensors in shards of either kind,
# and `minilora/llama/checkpoint.py` quantizes while it reads, one tensor ahead.
#
# ## The trap
#
# The other kind of file, `pytorch_model.bin`, is a *pickle*. A pickle is not data but a program that builds data, and it
# may call whatever it likes. Here is one that is "a checkpoint":

# %%
class Innocent:
    def __reduce__(self):
        return print, ("    this was run by a file of weights",)


with tempfile.TemporaryDirectory() as place:
    path = Path(place) / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(2), "extra": Innocent()}, path)
    print("torch.load(weights_only=False):")
    torch.load(path, weights_only=False)
    print("the package:")
    try:
        WeightFiles(Path(place))
        raise AssertionError("it should have been refused")
    except minilora.CheckpointError as error:
        print("   ", str(error).replace(place, "..."))

# %% [markdown]
# It could have read your keys as well as print a line. The package unpickles tensors and nothing else, and prefers
# safetensors wherever a repository has both.
#
# ## Your turn
#
# Write `tensor_places` and `streaming_peak` in `lessons/exercises/09.py`, then:
#
#     minilora check 9
