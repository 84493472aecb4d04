"""Makes known mistakes in a copy of the package, one at a time; the tests must notice each.

python scripts/mutate.py        # needs pip install '.[test]'; about an hour
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = (
    *("tests/test_goldens.py", "tests/test_oracle.py", "tests/test_preprocess.py"),
    *("tests/test_image.py", "tests/test_image_files.py", "tests/test_server_pictures.py"),
    *("tests/test_kernels.py", "tests/test_batch.py", "tests/test_reuse.py"),
    *("tests/test_gradients.py", "tests/test_tuner.py", "tests/test_explain.py"),
    *("tests/test_structured.py", "tests/test_sampling.py", "tests/test_adapters.py"),
    *("tests/test_clients.py", "tests/test_connections.py", "tests/test_data_urls.py"),
    *("tests/test_server.py", "tests/test_attacks.py"),
    *("tests/test_config.py", "tests/test_known_keys.py", "tests/test_tied_head.py"),
    *("tests/test_original_config.py", "tests/test_prompt.py", "tests/test_json_files.py"),
    *("tests/test_samples.py", "tests/test_scores.py", "tests/test_evaluate.py"),
    *("tests/test_evaluate_files.py", "tests/test_prompts_file.py", "tests/test_command.py"),
    *("tests/test_checkpoint.py", "tests/test_gguf.py"),
    *("tests/test_folders.py", "tests/test_chat.py", "tests/test_caption.py"),
)

#: What goes wrong, the file, the line as it is, the line with the mistake.
MUTATIONS = (
    ("approximate GELU in the projector", "model/layers", '"gelu": nn.gelu,', '"gelu": nn.gelu_approx,'),
    ("exact GELU in the tower", "model/layers", '"quick_gelu": quick_gelu', '"quick_gelu": nn.gelu'),
    ("class token dropped late", "model/llava", "return features[:, 1:]", "return features[:, :-1]"),
    ("feature layer -1", "model/config", "layer % states for layer", "(layer + 1) % states for layer"),
    ("post_layernorm applied", "model/clip", "return self.vision_model(mx.array(pixel_values).astype(self.dtype), num_layers)", "return [self.vision_model.post_layernorm(x) for x in self.vision_model(mx.array(pixel_values).astype(self.dtype), num_layers)]"),
    ("class token after the patches", "model/clip", "[class_token, patches]", "[patches, class_token]"),
    ("layer norm eps of the default", "model/clip", "eps=config.layer_norm_eps", "eps=1e-5"),
    ("rope theta 1e4", "model/rope_config", '{"rope_theta": float(theta), "rope_scaling": None}', '{"rope_theta": 1e4, "rope_scaling": None}'),
    ("context of llama3 inside its scaling alone", "model/rope_config", "data.get(key) or rope.get(key) or context", "rope.get(key) or context"),
    ("keys that change the maths read past", "model/config_checks", "and not _is_one_of(value, neutral)", "and False"),
    ("true taken for 1", "model/config_checks", " and (value is True) == (other is True)", ""),
    ("unknown keys not named", "model/config_checks", "    if not unknown:\n", "    if True:\n"),
    ("null ends hide the text model's", "model/config", "    if ids is None:\n        ids = (data", "    if False:\n        ids = (data"),
    ("stored head dropped", "checkpoint/contents", "        if not tied:", "        if False:"),
    ("any stored head kept", "checkpoint/contents", "return one.keys() == other.keys() and all(", "return False and all("),
    ("Gemma taken for LLaMA", "checkpoint/original", "if others := words & _OTHER_DECODERS:", "if others := set():"),
    ("GeoChat taken for LLaVA", "checkpoint/original", "or mark in kind.lower()", ""),
    ("text_config wins over the original's keys", "checkpoint/original", '{**(data.get("text_config") or {}), **data}', '{**data, **(data.get("text_config") or {})}'),
    ("another tower's key left out", "checkpoint/original", "{**parts[0], **parts[1]}", "{**parts[1], **parts[0]}"),
    ("rms norm eps of the default", "model/llama", "eps = config.hidden_size, config.rms_norm_eps", "eps = config.hidden_size, 1e-6"),
    ("head width from the hidden size", "model/config", "return self.head_dim or self", "return self"),
    ("interleaved RoPE", "model/llama", "traditional=False", "traditional=True"),
    ("unscaled llama3 RoPE", "model/llama", "return periods / (kept + (1 - kept) / factor)", "return periods"),
    ("window one too wide", "model/llama", "keys > queries - window", "keys >= queries - window"),
    ("padding not masked", "model/llama", "allowed & (attention_mask[:, None] > 0)", "allowed"),
    ("right padding", "inputs/processor", "start = ids.shape[1] - len(row)\n            ids[i, start:], mask[i, start:] = row, 1", "ids[i, : len(row)], mask[i, : len(row)] = row, 1"),
    ("head not tied", "model/llama", 'if "lm_head" in self:', "if True:"),
    ("unpad forgotten", "model/anyres", "skip = padding(", "skip = 0 * padding("),
    ("tiles not put in a grid", "model/anyres", ".transpose(0, 2, 1, 3, 4)", ""),
    ("newline forgotten", "model/anyres", "[grid, newlines], axis=1", "[grid, newlines * 0], axis=1"),
    ("base picture last", "model/anyres", "[tiles[0], _lines(shown, newline)]", "[_lines(shown, newline), tiles[0]]"),
    ("original unpad rounding for hf", "model/anyres", 'int(round(kept, 7) if convention == "hf" else kept)', "int(kept)"),
    ("pinpoints as (width, height)", "model/anyres", 'pinpoint if convention == "hf" else pinpoint[::-1]', "pinpoint[::-1]"),
    ("longer edge rounded", "inputs/image_processor", "longer = int(side *", "longer = round(side *"),
    ("bilinear resize", "inputs/image_processor", 'data.get("resample", Image.Resampling.BICUBIC)', 'data.get("resample", Image.Resampling.BILINEAR)'),
    ("padded on black", "inputs/image_processor", "tuple(int(mean * 255) for mean in self.mean)", "(0, 0, 0)"),
    ("strips in the wrong place", "inputs/image_processor", "(0, top + start)", "(0, start)"),
    ("pad colour rounded", "inputs/image_processor", "int(mean * 255)", "round(mean * 255)"),
    ("scans not counted", "inputs/image_files", "elif scans > MAX_SCANS:", "elif False:"),
    ("metadata handed on", "inputs/image_files", "if kind in _CHUNKS_KEPT:", "if True:"),
    ("EXIF of a TIFF handed on", "inputs/image_files", "directory.only(_TAGS_KEPT)", "content"),
    ("orientations as shorts alone", "inputs/tiff", '_LAYOUTS.get(kind, "B")', '"H"'),
    ("pictures not turned", "inputs/image", "if held in _TURNS", "if False"),
    ("12 bits in 16 left dark", "inputs/rgb", "elif declared >= highest > 0:", "elif False:"),
    ("loss not shifted", "tuner/losses", "labels = batch.labels[:, 1:]", "labels = batch.labels[:, :-1]"),
    ("padding learned", "tuner/data", "length, IGNORED)", "length, 0)"),
    ("questions learned", "tuner/data", "i if is_answer else IGNORED", "i"),
    ("end of answer not learned", "inputs/templates", "+ mark, learned), Piece(after)]", ", learned), Piece(mark + after)]"),
    ("no end where the template has none", "inputs/chat_template", "answer + (mark or lent)", "answer + mark"),
    ("end mark of an own template unknown", "inputs/processor", "stops=template.find_ends(tokenizer.special_tokens)", "stops=()"),
    ("what begins a turn ends answers", "inputs/chat_template", "mark.match(between[:opening])", "mark.match(between)"),
    ("Mistral called LLaMA is a Vicuna", "inputs/template_choice", '== "mistral" or has_mistral_sizes', '== "mistral"'),
    ("pictures left where they are", "tuner/samples", 'text.replace(IMAGE_TOKEN, "").strip()', "text"),
    ("system texts not learned", "tuner/samples", "Sample((*system, *messages)", "Sample((*messages,)"),
    ("pictures without marks lost", "tuner/samples", "if names and not marks:", "if False:"),
    ("videos passed over", "tuner/samples", "        if entry.get(key):\n", "        if False:\n"),
    ("unread keys not named", "tuner/samples", "isinstance(value, (str, list, dict)) and value", "False"),
    ("a skipped sample listed in every run", "tuner/skipped", "if identity in self._listed:", "if False:"),
    ("rows without an answer", "tuner/data", "if True not in learned[: self.max_length]:", "if False:"),
    ("placeholders left in the model", "tuner/trainer", "            self._give_back()\n            self._seed()", "            self._seed()"),
    ("chance left as a placeholder", "tuner/trainer", "            self._give_back()\n            self._seed()", "            self._give_back()"),
    ("decoder frozen in stage 2", "tuner/stages", "        model.language_model.unfreeze()\n", "        pass\n"),
    ("projector frozen with LoRA", "tuner/stages", 'if options.rates["multi_modal_projector"]:', 'if options.stage != "lora":'),
    ("whole tower trained", "tuner/stages", "[: max(model.config.feature_layers)]", "[:]"),
    ("AdamW without bias correction", "tuner/optimizer", "bias_correction=True", "bias_correction=False"),
    ("decay of norms too", "tuner/optimizer", "if is_matrix else 0.0", ""),
    ("no warm-up", "tuner/optimizer", "warmup = math.ceil(steps * warmup_ratio)", "warmup = 0"),
    ("mean of the parts' means", "tuner/trainer", "tree_map(mx.add, gradients, more)", "tree_map(lambda a, b: (a + b) / 2, gradients, more)"),
    ("data from the start again", "tuner/trainer", "epoch, first = divmod(self.step, self.batches_per_epoch)", "epoch, first = 0, 0"),
    ("optimiser's state forgotten", "tuner/trainer", '_ordered(arrays["trained"]), arrays["optimizer"]', '_ordered(arrays["trained"]), self.optimizer_state'),
    ("weights kept in 16 bits", "tuner/trainer", "lambda array: array.astype(mx.float32), parameters", "lambda array: array, parameters"),
    ("processes do not share", "tuner/trainer", "indices[self.group.rank() :: self.group.size()]", "indices"),
    ("control pieces numbered anew", "inputs/byte_bpe", "for i, piece in enumerate(pieces)}", "for i, piece in enumerate(pieces) if piece.kind == 1}"),
    ("digits of SmolLM kept together", "inputs/byte_bpe", '(r"\\p{N}", GPT_2)', "(GPT_2,)"),
    ("RoPE factors of a GGUF dropped", "checkpoint/gguf_config", "if tensor is None:", "if True:"),
    ("frequencies for periods", "model/llama", "return periods * mx.array(scaling", "return periods / mx.array(scaling"),
    ("experts of a GGUF ignored", "checkpoint/gguf_config", "not in neutral", "in ()"),
    ("placeholder of a GGUF's vocabulary left out", "checkpoint/gguf_config", "tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else rows", "rows"),
    ("unknown tensors of a GGUF dropped", "checkpoint/gguf", "if reason is None:", "if False:"),
    ("biases of Q and K not permuted", "checkpoint/gguf", "attn_([qk])\\.(weight|bias)", "attn_([qk])\\.(weight)"),
    ("halves of a block swapped", "checkpoint/gguf_blocks", "low | low >>", "high | high >>"),
    ("minimum of Q4_K added", "checkpoint/gguf_blocks", "(-outer[..., 1:]", "(outer[..., 1:]"),
    ("scale of LoRA forgotten in the sum", "checkpoint/lora", "weight + scale * (up @ down)", "weight + (up @ down)"),
    ("length of DoRA's columns, not rows", "checkpoint/lora", "axis = 1 if", "axis = 0 if"),
    ("alpha of one module forgotten", "checkpoint/peft", '_of_module(settings.get("alpha_pattern"), module,', "_of_module({}, module,"),
    ("pattern found anywhere in a name", "checkpoint/peft", '({pattern})$", module)', '({pattern})", module)'),
    ("rank-stabilised scale not taken", "checkpoint/peft", 'math.sqrt(rank) if settings.get("use_rslora") else rank', "rank"),
    ("matrices of mlx-lm not transposed", "checkpoint/mlx_lora", "a, b = b.then(lambda array: array.T), a.then(lambda array: array.T)", "pass"),
    ("PiSSA on the base itself", "checkpoint/peft", '"gaussian", "eva"', '"pissa_niter_4", "gaussian", "eva"'),
    ("future seen within a block", "model/linux_cpu", "where=later[:rows, :rows]", "where=False"),
    ("scores not scaled", "model/linux_cpu", "queries[i] * scale", "queries[i]"),
    ("quick GELU of another slope", "model/linux_cpu", "slope=1.702)", "slope=1.7)"),
    ("pictures not told apart", "generation/prompt_cache", "keys[place] = picture.digest", "pass"),
    ("size not part of a picture", "generation/prompt_cache", "repr((size, pixels.shape))", "repr(pixels.shape)"),
    ("nothing left to read", "generation/prompt_cache", "zip(self.keys[:-1], keys", "zip(self.keys, keys"),
    ("cut inside a picture", "generation/prompt_cache", "return min([length, *cut])", "return length"),
    ("cache of another model", "generation/prompt_cache", 'if metadata["model"] != self._identity:', "if False:"),
    ("prompt rolled over", "model/cache", "place = self.keep + (self", "place = (self"),
    ("rows at one position", "model/llama", "return mx.array(offset), [", "return mx.array(offset[:1] * len(offset)), ["),
    ("rows share their chance", "generation/sampling", "return sampler if seed is None else _seeded(sampler, seed)", "return sampler"),
    ("unlikely tokens drawn", "generation/sampling", "likelier >= top_p * total", "likelier >= total"),
    ("penalty turned round", "generation/sampling", "repeated < 0, repeated * penalty, repeated / penalty", "repeated < 0, repeated / penalty, repeated * penalty"),
    ("a removed row goes on", "generation/batch", "self._rows = [row for row in self._rows if row.uid != uid]", "pass"),
    ("attention not scaled", "analysis/trace", "(queries * scale)", "queries"),
    ("heads in another order", "analysis/trace", "B, heads, H // heads, L, D)", "B, H // heads, heads, L, D).swapaxes(1, 2)"),
    ("future seen", "analysis/trace", "mx.tri(L, T, T - L, dtype=mx.bool_)", "mx.ones((L, T), mx.bool_)"),
    ("rollout without the residual", "analysis/trace", "weights.mean(axis=0) + mx.eye(weights.shape[1])", "2 * weights.mean(axis=0)"),
    ("last state not normed", "analysis/trace", "*hidden, normed", "*hidden, last"),
    ("attention of the word after", "analysis/attribution", "range(length - 1, length - 1 + len(tokens))", "range(length, length + len(tokens))"),
    ("last state normed twice", "analysis/attribution", "decoder.unembed(x) if is_last else decoder.logits(x)", "decoder.logits(x)"),
    ("another picture masked", "analysis/attribution", "(*others[:picture], new, *others[picture + 1 :])", "(new, *others[1:])"),
    ("rows and columns exchanged", "analysis/places", "across[:, None, :-1], across[:, None, 1:]", "across[:, :-1, None], across[:, 1:, None]"),
    ("margin of pad forgotten", "inputs/image_processor", "(left - beside, top - above, right - beside, bottom - above)", "(left, top, right, bottom)"),
    ("corner of crop forgotten", "inputs/image_processor", "corner = center_corner(resized, (side, side))", "corner = (0, 0)"),
    ("tiles of anyres not centred", "inputs/image_processor", "(y - above, x - beside) for y, x in tile_corners(canvas, side)", "(y, x) for y, x in tile_corners(canvas, side)"),
    ("a line's end has a place", "analysis/places", "mx.full((4,), np.nan)", "mx.zeros((4,))"),
    ("areas forgotten", "analysis/places", "values / ((right - left) * (bottom - top))", "values"),
    ("normalised in float64", "inputs/image_processor", ".astype(np.float32)\n        mean", "\n        mean"),
    ("answers under another's number", "serving/engine", "self._answers[uid] = _Answer(job, index)", "self._answers[uid] = _Answer(job, 0)"),
    ("a client that went keeps the model busy", "serving/engine", "            self._generator.remove(uid)\n", ""),
    ("places not given back", "serving/engine", "            self.taken -= count", "            pass"),
    ("one failure ends the thread", "serving/engine", "except Exception as error:\n            logger.exception(\"The model", "except ZeroDivisionError as error:\n            logger.exception(\"The model"),
    ("tokens of a stop text told", "serving/engine", "while out and len", "while False and len"),
    ("seeds all equal", "serving/requests", "_as_seed(options.seed + i)", "_as_seed(options.seed)"),
    ("top_p of zero as none", "serving/requests", "if self.top_p == 0:", "if False:"),
    ("parameters without effect taken", "serving/requests", "    check_parameters(data)\n", ""),
    ("parts of messages lost", "serving/requests", '    check_fields(data.get("messages"))\n', ""),
    ("earlier system texts forgotten", "serving/messages", "system = (system or []) + parts", "system = parts"),
    ("pictures of the system's lost", "serving/messages", "shown += [part for part in parts if isinstance(part, ImagePart)]", "pass"),
    ("turns not joined", "serving/messages", "elif turns and turns[-1][0] == message.role:", "elif False:"),
    ("blanks in base64", "inputs/image", "translate(_BASE64_OF_URLS, _BLANKS)", "translate(_BASE64_OF_URLS)"),
    ("any number of keys parsed", "serving/json_bodies", "    _check_structure(body)\n", ""),
    ("parsed where all wait", "serving/app", "await workers.run(partial(read_request, body, kind))", "read_request(body, kind)"),
    ("usage counts a prompt n times", "serving/app", "is_new_prompt=piece.index % self._n == 0", "is_new_prompt=True"),
    ("pixels counted one by one", "serving/app", "pixels += pictures[-1].width * pictures[-1].height", "pass"),
    ("what is left told as the limit", "serving/app", "if pictures and isinstance(error, PixelsError):", "if False:"),
    ("all formats decoded", "serving/app", "load_image(file, limit - pixels, FORMATS)", "load_image(file, limit - pixels)"),
    ("texts wait for pictures", "serving/app", "self._decoding if urls else self._reading", "self._decoding"),
    ("sent pictures wait for fetched ones", "serving/app", "self._holding if any(map(is_remote, urls)) else nullcontext()", "self._holding"),
    ("pictures from elsewhere that add up", "serving/app", "min(MAX_BYTES, self.limits.body_bytes - sum(map(len, files.values())))", "MAX_BYTES"),
    ("pictures decoded outside the time of the answer", "serving/app", "with anyio.fail_after(self.limits.seconds):", "if True:"),
    ("a worker given away", "serving/workers", "        await self._free.acquire()\n", ""),
    ("any content type read", "serving/app", 'if kind != "application/json":', "if False:"),
    ("announced length believed", "serving/bodies", "if size > self.max_bytes:", "if False:"),
    ("bodies that add up", "serving/bodies", "if self._held > BODIES * self.max_bytes:", "if False:"),
    ("two lengths of a body", "serving/guard", 'if "content-length" in headers and "transfer-encoding" in headers:', "if False:"),
    ("idle clients shut all out", "serving/connection", "if waiting:", "if False:"),
    ("half-closed clients get nothing", "serving/connection", "if self.asks_for_nothing or self.cycle.more_body:\n            return False", "return False"),
    ("a client that is gone is waited for", "serving/connection", "self._probe(self.cycle, _Begun(self.transport))", "pass"),
    ("letters written twice", "serving/connection", "content[self._written :]", "content"),
    ("no HTTP answered as text", "serving/connection", "def send_400_response", "def refuse"),
    ("nobody told of the end", "serving/http_server", "self._stop()", "pass"),
    ("any name answered to", "serving/guard", "if len(hosts) != 1 or not self._knows(hosts[0]):", "if len(hosts) != 1:"),
    ("pages of others answered", "serving/guard", "if origin not in (None,", "if False and origin not in (None,"),
    ("key compared without its scheme", "serving/guard", ' or scheme.lower() != "bearer"', ""),
    ("wrong keys let in", "serving/guard", "not hmac.compare_digest(*digests)", "not digests"),
    ("redirects not checked", "inputs/fetch", "_check_url(url)\n                    async", "async"),
    ("name looked up again", "inputs/fetch", "connect_tcp(address, port", "connect_tcp(host, port"),
    ("private addresses fetched from", "inputs/fetch", "return ip.is_global and not ip.is_multicast", "return True"),
    ("addresses inside addresses", "inputs/fetch", "if inner is not None and not is_public(str(inner)):", "if False:"),
    ("connections left behind", "inputs/fetch", "await stream.aclose()", "pass"),
    ("no end of time", "inputs/fetch", "with anyio.fail_after(seconds):", "if True:"),
    ("links followed", "serving/pictures", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK"),
    ("links of folders followed", "serving/pictures", "os.O_DIRECTORY | os.O_NOFOLLOW", "os.O_DIRECTORY"),
    ("the folder above", "serving/pictures", '".." in path.parts', "False"),
    ("what is read is replaced", "folders", "if path.exists() and (_contains(place, path) or _contains(path, place)):", "if False:"),
    ("what somebody changed is ours", "folders", "return _fingerprint(path) == listed[name]", "return True"),
    ("every folder is a model's", "folders", "kind == \"model\" and _is_bare_model(folder)", "kind == \"model\""),
    ("half a folder is put back", "folders", "if not strangers and {*ours} >= {", "if True or {*ours} >= {"),
    ("two commands write one folder", "folders", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    ("a link is a file of ours", "folders", "if path.is_symlink() or not path.is_file():", "if not path.is_file():"),
    ("the old folder goes before the new one is there", "folders", "        place.rename(replaced)\n", "        remove_folder(place, kind)\n"),
    ("the folder is looked at once", "folders", "check_target(target, kind, force, keep)\n            _swap", "_swap"),
    ("anything is written over", "files", "if any(mark.format(command).encode() in head for mark in _MARKS):", "if True:"),
    ("what is read is written", "files", "if any(is_same_file(expand_home(name), path) for name in names):", "if False:"),
    ("a long name has no room", "files", "if len(os.fsencode(name)) > _LONGEST:", "if False:"),
    ("a picture for each link to it", "inputs/picture_files", "names.setdefault(real, name)", "names[Path(name)] = name"),
    ("somebody's text is replaced", "caption", "if os.path.lexists(path):", "if False:"),
    ("somebody's file is gone on with", "caption", "is_ours = all(map(bytes.startswith, records, beginnings))", "is_ours = True"),
    ("paths begin within words", "inputs/mentions", "if _may_begin(line, start):", "if True:"),
    ("bytes that are no text", "chat", "if bad is not None:", "if False:"),
    ("an answer may end anywhere", "generation/json_schema", "self.special_token_ids = sorted", "self.special_token_ids = [] and sorted"),
    ("lines cut at Unicode's separators", "json_files", 'enumerate(text.split("\\n"), 1)', "enumerate(text.splitlines(), 1)"),
    ("a byte-order mark is text", "json_files", '    text = text.removeprefix(_BOM)\n', ""),
    ("half a pair of surrogates", "json_files", "        if half:\n", "        if False:\n"),
    ("a key's first value lost", "json_files", "if len(value) < len(pairs):", "if False:"),
    ("nesting without end", "json_files", "except RecursionError:", "except ZeroDivisionError:"),
    ("somebody's last line cut off", "json_files", "return whole + end if is_ours else data", "return whole + end"),
    ("true is a number", "json_files", "if type(value) not in kinds:", "if not isinstance(value, kinds):"),
    ("another system's notes are weights", "checkpoint/folder", 'if not path.name.startswith(".")', "if True"),
    ("a download that goes on is read", "checkpoint/folder", "if not head or control.exists():", "if not head:"),
    ("pointers of Git LFS read", "checkpoint/folder", "if is_pointer(head):", "if False:"),
    ("arguments that are no text", "arguments", "if not is_text and", "if False and"),
    ("POPE by order", "analysis/scores", "truth.append(_pope_label(*labels[key]))", "truth.append(_pope_label(*[*labels.values()][len(truth)]))"),
    ("POPE with other labels", "analysis/scores", "if len(own) != len(labels):", "if False:"),
    ("labels of other questions", "analysis/scores", "if not given & truth:", "if False:"),
    ("a bad line ends all", "generation/batch", "except (ValueError, OSError, TypeError, RecursionError)", "except OSError"),
    ("the schema looks at the prompt", "generation/json_schema", "if self._begun:", "if True:"),
)  # fmt: skip


def survives(file: str, line: str, mistake: str) -> bool:
    """Whether the tests pass in spite of a mistake."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("mlx_llava", "tests", "scripts", "weights"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "mlx_llava" / f"{file}.py"
        source = path.read_text(encoding="utf-8")
        if line not in source:
            raise SystemExit(
                f"{file}.py has no {line!r} any more; bring scripts/mutate.py up to date"
            )
        path.write_text(source.replace(line, mistake), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", *TESTS]
        run = subprocess.run(command, cwd=copy, capture_output=True, check=False)
        return run.returncode == 0


def main() -> None:
    """Prints a line for each mistake; exits 1 if one goes unnoticed."""
    unnoticed = []
    for name, file, line, mistake in MUTATIONS:
        survived = survives(file, line, mistake)
        print(f"{'UNNOTICED' if survived else 'noticed':<10} {name}", flush=True)
        unnoticed += [name] * survived
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
