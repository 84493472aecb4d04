"""Every llava-hf spelling loads to the same tensors; what does not fit is an error."""

from __future__ import annotations

import json
import re
import resource
import shutil
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llava.checkpoint import folder as folder_of_weights
from mlx_llava.checkpoint import safetensors as files
from mlx_llava.checkpoint.adapters import is_adapter
from mlx_llava.checkpoint.save import save
from mlx_llava.checkpoint.tensors import canonical_name, canonical_tensors, from_array
from mlx_llava.model.linux.adopt import adopt
from tests.conftest import GOLDENS, PICTURE
from tests.conftest import load_as_stored as load

PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def rename(key: str, *rules: tuple[str, str]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def new_style(key: str) -> str:
    """transformers 4.52+ in memory: everything below model., no inner model."""
    return rename(
        key,
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    )


SPELLINGS = {
    "hub": lambda key: key,
    "transformers_4.52": new_style,
    "transformers_5": lambda key: rename(new_style(key), (r"vision_model\.", "")),
    "transformers_5_saved": lambda key: rename(key, (r"vision_model\.", "")),
    "doubled": lambda key: rename(key, (r"^(language_model|vision_tower)\.", r"\1.\1.")),
    "doubled_below_model": lambda key: rename(
        key,
        (r"^(vision_tower)\.", r"model.\1.\1."),
        (r"^language_model\.model", r"model.language_model.language_model.model"),
    ),
}


def canonical(folder: Path) -> dict[str, mx.array]:
    """The tensors of a golden under their canonical names, in PyTorch's layout."""
    tensors = mx.load(str(folder / "model.safetensors"))
    return {canonical_name(key): tensor for key, tensor in tensors.items()}


def write(
    golden: Path,
    target: Path,
    tensors: dict[str, mx.array],
    shards: int = 1,
    index: bool = True,
    metadata="pt",
) -> Path:
    """A copy of a golden with other weight files."""
    shutil.copytree(golden, target, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {key: tensors[key] for key in names[i::shards]}
        mx.save_safetensors(str(target / name), part, {"format": metadata})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1 and index:
        (target / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target


def parameters(folder: Path) -> dict[str, mx.array]:
    model, _ = load(folder)
    return dict(tree_flatten(model.parameters()))


def equal(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> bool:
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_tensors(golden, spelling, shards, tmp_path):
    tensors = {SPELLINGS[spelling](key): t for key, t in canonical(golden).items()}
    prefix = next(key for key in tensors if "layers.0.self_attn.q_proj" in key).partition("layers")[
        0
    ]
    tensors[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(4)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = mx.arange(17)[None]
    folder = write(golden, tmp_path / "copy", tensors, shards, index=spelling != "hub")
    assert equal(parameters(folder), parameters(golden))


def test_weights_keep_their_dtype_and_can_be_cast_by_part(golden, tmp_path):
    half = {key: tensor.astype(mx.float16) for key, tensor in canonical(golden).items()}
    folder = write(golden, tmp_path / "half", half)
    assert {tensor.dtype for tensor in parameters(folder).values()} == {mx.float16}
    model, processor = load(
        folder, dtype="bfloat16", vision_dtype="float32", projector_dtype="float16"
    )
    assert model.vision_tower.dtype == mx.float32
    assert model.multi_modal_projector.linear_1.weight.dtype == mx.float16
    assert model.language_model.model.embed_tokens.weight.dtype == mx.bfloat16
    assert model(**processor("<image>", PICTURE)).dtype == mx.bfloat16


def test_nothing_is_read_before_it_is_used(golden, tmp_path):
    folder = tmp_path / "lazy"
    shutil.copytree(golden, folder)
    model, _ = load(folder, lazy=True)
    unused = model.vision_tower.vision_model.post_layernorm.weight
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size // 2)
        file.truncate(size)  # the second half of the file is zeros now
    names = ["self_attn.o_proj", "post_layernorm"]
    assert unused.shape == (24,)
    loaded_late = [
        mx.abs(t).max().item()
        for k, t in tree_flatten(model.parameters())
        if any(n in k for n in names)
    ]
    assert 0 in loaded_late


@pytest.mark.parametrize("is_mlx", [True, False])
def test_patches_of_3_pixels_are_told_apart_by_the_files_format(is_mlx):
    patches = mx.random.normal((8, 3, 3, 3))
    found = canonical_tensors({PATCHES: from_array("file", patches)}, is_mlx)
    expected = patches if is_mlx else patches.transpose(0, 2, 3, 1)
    assert mx.array_equal(found.tensors[PATCHES].read(), expected)


def test_mlx_layout_is_recognised_by_shape(golden, tmp_path):
    tensors = canonical(golden)
    tensors[PATCHES] = mx.contiguous(tensors[PATCHES].transpose(0, 2, 3, 1))
    for metadata in ("pt", "mlx"):
        folder = write(golden, tmp_path / metadata, tensors, metadata=metadata)
        assert equal(parameters(folder), parameters(golden))


def wide_model(tmp_path: Path) -> Path:
    """A checkpoint whose widths can be quantised in groups of 32."""
    tiny = pytest.importorskip("tests.tiny")
    case = tiny.Case(
        "wide",
        text={"hidden_size": 64, "intermediate_size": 96},
        vision={"hidden_size": 96, "intermediate_size": 128},
    )
    tiny.save(case, tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("tower", [False, True], ids=["language_only", "tower_too"])
def test_mlx_quantised_with_overrides(tower, tmp_path):
    source = wide_model(tmp_path)
    model, processor = load(source)
    down = "language_model.model.layers.0.mlp.down_proj"
    skipped = "language_model.model.layers.1.mlp.up_proj"

    def settings(path: str, module: nn.Module):
        if path == skipped or not hasattr(module, "to_quantized"):
            return False
        if not tower and not path.startswith("language_model"):
            return False
        return {"group_size": 32, "bits": 8} if path == down else {"group_size": 32, "bits": 4}

    nn.quantize(model, class_predicate=settings)
    adopt(model)  # as `load` does, so that not a bit differs
    tensors = dict(tree_flatten(model.parameters()))
    folder = write(source, tmp_path / "quantised", tensors, metadata="mlx")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {
        "group_size": 32,
        "bits": 4,
        down: {"group_size": 32, "bits": 8},
        skipped: False,
    }
    config["quantization_config"] = config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))

    again, _ = load(folder)
    assert equal(dict(tree_flatten(again.parameters())), tensors)
    layers = again.language_model.model.layers
    assert (layers[0].mlp.down_proj.bits, layers[0].mlp.up_proj.bits) == (8, 4)
    assert not hasattr(layers[1].mlp.up_proj, "bits")
    inputs = processor("<image>\nWhat?", PICTURE)
    assert mx.array_equal(again(**inputs), model(**inputs))
    half, _ = load(folder, dtype="float16")
    assert half(**inputs).dtype == mx.float16

    save(again, processor, tmp_path / "saved")
    assert equal(parameters(tmp_path / "saved"), tensors)


def test_8_bits_are_close_to_float(tmp_path):
    source = wide_model(tmp_path)
    model, processor = load(source)
    inputs = processor("<image>\nWhat?", PICTURE)
    exact = model(**inputs)
    nn.quantize(model.language_model, group_size=32, bits=8)
    assert mx.abs(model(**inputs) - exact).max() / mx.abs(exact).max() < 0.05


def test_save_then_load_is_the_identity(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_SHARD_BYTES", 100_000)
    model, processor = load(golden)
    save(model, processor, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    again, same_processor = load(tmp_path / "saved")
    assert again.config == model.config
    assert same_processor.image_processor == processor.image_processor
    assert same_processor.eos_ids == processor.eos_ids
    assert equal(dict(tree_flatten(again.parameters())), dict(tree_flatten(model.parameters())))
    prompt = [{"role": "user", "content": "What?"}]
    inputs, other = processor(prompt, PICTURE), same_processor(prompt, PICTURE)
    assert inputs.prompts == other.prompts
    assert mx.array_equal(again(**other), model(**inputs))


@pytest.mark.parametrize("name", ["gqa", "next", "siglip_head", "vip", "onevision"])
def test_transformers_reads_what_we_save(name, tmp_path):
    hf = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tiny = pytest.importorskip("tests.tiny")
    tiny.save(next(case for case in tiny.CASES if case.name == name), tmp_path / "theirs")
    model, processor = load(tmp_path / "theirs")
    save(model, processor, tmp_path / "saved")
    reference, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    read = (
        tiny.read_onevision_processor if name == "onevision" else hf.AutoProcessor.from_pretrained
    )
    batch = read(tmp_path / "saved")(
        text="USER: <image>\nWhat?", images=Image.open(PICTURE), return_tensors="pt"
    )
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = mx.array(reference(**batch).logits.numpy())
    ours = model(**processor("USER: <image>\nWhat?", Image.open(PICTURE), raw=True))
    assert mx.abs(ours - theirs).max() < 3e-5


def test_saving_over_something_is_refused_and_failing_leaves_nothing(golden, tmp_path, monkeypatch):
    model, processor = load(golden)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        save(model, processor, tmp_path / "there")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(mx, "contiguous", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, processor, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def broken(golden: Path, folder: Path, change) -> Path:
    tensors = canonical(golden)
    change(tensors)
    return write(golden, folder, tensors)


NORM = "language_model.model.norm.weight"
PROJECTOR = "multi_modal_projector.linear_1.bias"
CHANGES = {
    "missing": (lambda t: t.pop(NORM), f"1 tensors are missing: {NORM}"),
    "unexpected": (lambda t: t.update(extra=mx.zeros(1)), "1 tensors are unexpected: extra"),
    "double": (
        lambda t: t.update({"model.language_model.norm.weight": t[NORM]}),
        f"and .* are both {NORM}",
    ),
    "shape": (
        lambda t: t.update({PROJECTOR: mx.zeros(33)}),
        r"multi_modal_projector.linear_1.bias \(33,\) where config.json says \(32,\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit_are_listed(golden, name, tmp_path):
    change, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        load(broken(golden, tmp_path / "broken", change))


def test_a_config_that_lies_about_a_size_is_refused(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "liar")
    config = json.loads((golden / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (tmp_path / "liar" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"9 tensors have another shape: .*\(32, 52\) where config.json says \(32, 64\)",
    ):
        load(tmp_path / "liar")


def test_a_config_that_lies_about_its_depth_is_refused_at_once(golden, tmp_path):
    for part in ("text_config", "vision_config"):
        folder = tmp_path / part
        shutil.copytree(golden, folder)
        config = json.loads((golden / "config.json").read_text())
        config[part]["num_hidden_layers"] = 10**9
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{part} has num_hidden_layers=1000000000, but"):
            load(folder)


@pytest.mark.parametrize("ends", ["2", [2, "7"], 2.0, True, {"a": 1}])
def test_ends_that_are_no_ids_are_refused(golden, ends, tmp_path):
    shutil.copytree(golden, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match=r"generation_config.json has eos_token_id=.*list of ids"):
        load(tmp_path / "copy")


def test_a_file_of_foreign_names_is_told_by_one_of_them(golden, tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in canonical(golden).items()}
    folder = write(golden, tmp_path / "parallel", tensors)
    with pytest.raises(ValueError, match=r"has 0; its first tensor is module\.\w+"):
        load(folder)


SETTINGS = (
    *product(("llava", "llava_next"), ("config", "processor_config")),
    *product(("llava",), ("tokenizer_config", "generation_config", "tokenizer")),  # both have these
)


@pytest.mark.filterwarnings("ignore:config.json has keys")
@pytest.mark.parametrize(("golden", "name"), SETTINGS)
def test_values_of_the_wrong_kind_are_no_traceback(golden, name, tmp_path):
    """Every value of every settings file in turn becomes one of another kind."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDENS / golden, folder)
    original = json.loads((folder / f"{name}.json").read_text())
    paths = [(key,) for key in original]
    paths += [(k, j) for k, v in original.items() if isinstance(v, dict) for j in list(v)[:30]]
    refused = 0
    for path in paths:
        for wrong in (3.5, "x", [[]], {"a": 1}):
            data = json.loads(json.dumps(original))
            target = data
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = wrong
            (folder / f"{name}.json").write_text(json.dumps(data))
            try:
                load(folder, lazy=True)
            except (ValueError, OSError) as error:
                refused += "\n" not in str(error)
    assert refused >= 2


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(golden, index, tmp_path):
    folder = write(golden, tmp_path / "shards", canonical(golden), shards=3, index=index)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 weight files: model-00002-of-00003"):
        load(folder)


def test_an_index_of_shards_that_became_one_file_is_passed_over(golden, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(golden, folder)
    index = folder / "model.safetensors.index.json"
    old = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": old}))
    assert equal(parameters(folder), parameters(golden))
    index.write_text(json.dumps({"weight_map": {**old, "model.norm.weight": "model.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 weight files"):
        load(folder)


@pytest.mark.parametrize("size", [0, 4, 500, 100_000])
def test_a_cut_off_file_is_refused(golden, size, tmp_path):
    folder = write(golden, tmp_path / "cut", canonical(golden))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(
        ValueError, match=r"model.safetensors (is empty|is not a safetensors|has 100,000 bytes)"
    ):
        load(folder)


def test_what_other_systems_leave_in_a_folder_is_no_part_of_it(golden, tmp_path):
    """macOS puts ._NAME beside NAME on disks of other systems; a download's rest is no weight."""
    folder = write(golden, tmp_path / "model", canonical(golden), shards=2, index=False)
    names = [path.name for path in folder.iterdir()]
    for name in (*(f"._{name}" for name in names), "._model.bin", ".DS_Store", ".gitattributes"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    for name in ("model.safetensors.part", "model.safetensors.incomplete", "x.crdownload"):
        (folder / name).touch()
    (folder / "._pytorch_model.bin").touch()
    found, _ = folder_of_weights.read_folder(folder)
    assert found.keys() == canonical(golden).keys()
    assert load(folder, lazy=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "._adapter_model.safetensors"):
        (adapter / name).touch()
    assert is_adapter(adapter)


@pytest.mark.parametrize(
    ("shard", "beside", "message"),
    [
        (None, "model.safetensors.part", "lacks 1 of 2 weight files: {}, but unfinished"),
        (None, "Unconfirmed 12.crdownload", "but unfinished downloads: Unconfirmed 12.crdownload"),
        (
            None,
            ".cache/huggingface/download/x.incomplete",
            "but unfinished downloads: x.incomplete",
        ),
        (b"", "model.safetensors.part", "{} is empty, but unfinished downloads: model.safetens"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "x", "{} is only Git LFS's pointer"),
        (b"\0" * 99, "{}.aria2", "{} is not whole: there is {}.aria2"),
    ],
)
def test_a_download_that_did_not_end_is_named(golden, shard, beside, message, tmp_path):
    folder = write(golden, tmp_path / "model", canonical(golden), shards=2, index=False)
    path = folder / "model-00002-of-00002.safetensors"
    path.unlink()
    if shard is not None:
        path.write_bytes(shard)
    rest = folder / beside.replace("{}", path.name)
    rest.parent.mkdir(parents=True, exist_ok=True)
    rest.touch()
    with pytest.raises((ValueError, OSError), match=re.escape(message.replace("{}", path.name))):
        load(folder)


def test_files_that_lead_astray_are_refused(golden, tmp_path):
    folder = write(golden, tmp_path / "copy", canonical(golden))
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        load(folder)
    (folder / files.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load(folder)
    (folder / files.INDEX).unlink()
    header = json.dumps({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="holds x as F99, which MLX has no type for"):
        load(folder)


HEADERS = [
    {"x": 3},
    {"x": {}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    {"__metadata__": 7},
    [1, 2],
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_make_no_sense_are_refused(header, tmp_path):
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"x.safetensors (is not a safetensors file|has \d+ bytes)"
    ):
        files.read_file(tmp_path / "x.safetensors")


def test_folders_without_parts_are_named(golden, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(golden, folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=r"has no (tokenizer.json|\*.safetensors)"):
            load(folder)
    with pytest.raises(FileNotFoundError, match=r"There is no folder ./nowhere/at-all"):
        load("./nowhere/at-all")


def test_a_repository_is_taken_from_the_hub_cache(golden, hub_cache):
    snapshot = hub_cache / "models--someone--tiny" / "snapshots" / "abc123"
    shutil.copytree(golden, snapshot)
    for name in ("main", "v1"):
        reference = snapshot.parent.parent / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text("abc123")
    for revision in (None, "v1"):
        model, _ = load("someone/tiny", offline=True, revision=revision)
        assert model.config.model_type == golden.name
    with pytest.raises(FileNotFoundError, match="not among the downloaded repositories"):
        load("someone/tiny", offline=True, revision="v2")
    with pytest.raises(FileNotFoundError, match="There is no folder someone/else"):
        load("someone/else", offline=True)


def test_wrong_names_are_refused(golden):
    for option, message in (
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"vision_device": "tpu"}, "no device 'tpu'"),
        ({"template": "none"}, "no template 'none'"),
        ({"image_mode": "none"}, "no image mode 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(golden, **option)


def test_the_vision_tower_can_run_on_another_device():
    model, processor = load(GOLDENS / "llava", vision_device="cpu")
    other, _ = load(GOLDENS / "llava")
    inputs = processor("<image>", PICTURE)
    assert mx.abs(model(**inputs) - other(**inputs)).max() < 1e-5


def test_loading_is_strict_about_a_tied_head(tmp_path):
    tiny = pytest.importorskip("tests.tiny")
    tiny.save(tiny.Case("tied", text={"tie_word_embeddings": True}), tmp_path / "tied")
    model, _ = load(tmp_path / "tied")
    assert "lm_head" not in model.language_model
    assert model.config.tie_word_embeddings


def test_a_full_disk_is_an_error_of_one_line(tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors cannot be written"):
            files.write_arrays(tmp_path / "a.safetensors", {"a": mx.zeros((8192,))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_loading_says_how_far_it_has_come(monkeypatch):
    monkeypatch.setattr("mlx_llava.checkpoint.load._AT_ONCE", 10_000)
    told: list[tuple[int, int]] = []
    load(GOLDENS / "llava", progress=lambda *now: told.append(now))
    done = [now for now, _ in told]
    assert len(done) > 5
    assert done == sorted(done)
    assert {total for _, total in told} == {done[-1]}
