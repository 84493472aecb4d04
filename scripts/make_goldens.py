"""Writes tests/goldens: tiny checkpoints with the reference's own numbers.

The goldens keep the truth where torch is not installed. They are random models, made by
transformers, with everything that it computes on one prompt and one picture.

    python scripts/make_goldens.py        # needs pip install '.[test]'
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
CASES = {
    "llava": tiny.Case("llava", images=(1,)),
    "llava_next": tiny.Case("llava_next", next=True, family="mistral", images=(1,)),
}
PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"


def main() -> None:
    """Writes every golden."""
    shutil.rmtree(GOLDENS, ignore_errors=True)
    GOLDENS.mkdir()
    picture = tiny.picture(64, 48)
    picture.save(GOLDENS / "picture.png")
    for name, case in CASES.items():
        folder = GOLDENS / name
        model = tiny.save(case, folder)
        ends = {"eos_token_id": [2], "pad_token_id": 3}
        (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
        batch = tiny.make_processor(case)(text=PROMPT, images=picture, return_tensors="pt")
        batch.pop("token_type_ids", None)
        pixels = batch["pixel_values"].flatten(0, -4)
        states = tiny.torch_hidden_states(model, pixels)
        with torch.no_grad():
            logits = model(**batch).logits.numpy()
            tokens = model.generate(**batch, max_new_tokens=32, do_sample=False)
        arrays = {f"hidden_states.{i}": state for i, state in enumerate(states)}
        arrays["input_ids"] = batch["input_ids"].numpy()
        arrays["pixel_values"] = pixels.numpy()
        arrays["logits"] = logits
        arrays["tokens"] = tokens[0, batch["input_ids"].shape[1] :].numpy()
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()},
            GOLDENS / f"{name}.safetensors",
            metadata={
                "command": "python scripts/make_goldens.py",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "prompt": PROMPT,
            },
        )


if __name__ == "__main__":
    main()
