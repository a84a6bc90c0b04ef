"""Which bytes do the experts of a model trained by train_lm.py take? Tables and a page, as in section 7 of the paper.

    python examples/trace_lm.py runs/train_lm                  # on the validation files of Python's library
    python examples/trace_lm.py runs/train_lm --text code.py

Prints the entropy of routing by class of byte and layer, and the bytes that each expert gets most; writes experts.html
into the directory of the run.
"""

import re
from argparse import ArgumentParser
from keyword import kwlist
from pathlib import Path

import runs
import torch
from optimizers import muon_and_adamw
from processes import processes
from torch import Tensor
from train_lm import EVAL_BATCHES, Settings, build_model, windows

from st_moe_pytorch.tools.pictures import expert_page
from st_moe_pytorch.tools.trace import entropy_table, expert_table, trace
from st_moe_pytorch.tools.watch import record_routing

CLASSES = ("keyword", "other letter", "digit", "space", "line break", "punctuation", "other byte")
KEYWORDS = re.compile(rf"\b({'|'.join(kwlist)})\b".encode())
BYTES = [bytes([byte]).decode("latin-1") for byte in range(256)]


def classes_of(text: bytes) -> Tensor:
    """(n) int64: the class of every byte. Keywords are those of Python, in comments and strings too."""
    by_byte = torch.full((256,), CLASSES.index("other byte"))
    for byte in range(128):
        c = chr(byte)
        if c.isalpha() or c == "_":
            by_byte[byte] = CLASSES.index("other letter")
        elif c.isdigit():
            by_byte[byte] = CLASSES.index("digit")
        elif c == "\n":
            by_byte[byte] = CLASSES.index("line break")
        elif c.isspace():
            by_byte[byte] = CLASSES.index("space")
        elif c.isprintable():
            by_byte[byte] = CLASSES.index("punctuation")
    classes = by_byte[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]
    for found in KEYWORDS.finditer(text):
        classes[slice(*found.span())] = CLASSES.index("keyword")
    return classes


def trained_model(out: Path) -> tuple[torch.nn.Module, Settings]:
    """The model of a run's last checkpoint, and the settings of the run."""
    saved = runs.read_settings(out)
    settings = Settings(**{name: value for name, value in saved.items() if name != "text"})
    model = build_model(settings)
    if not runs.load(out, model, muon_and_adamw(model, settings.lr)):
        raise SystemExit(f"trace_lm.py: {out} has no checkpoint")
    return model.eval(), settings


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a sparse run of train_lm.py")
    parser.add_argument("--text", type=Path, help="file to trace instead of Python's library, of which its last tenth")
    parser.add_argument("--most", type=int, default=6, help="bytes to tell of each expert")
    args = parser.parse_args()
    with processes():
        model, settings = trained_model(args.run)
        text = runs.read_corpus(args.text, settings.seq_len)[1]
        classes = classes_of(text.numpy().tobytes())
        starts = torch.linspace(0, len(text) - settings.seq_len - 1, EVAL_BATCHES * settings.batch).long()
        kinds = [windows(of, starts, settings)[0].split(settings.batch) for of in (text, classes)]
        with record_routing(model) as routings:
            for batch in kinds[0]:
                model(batch)
    by_byte, by_class = (trace(each, routings, number) for each, number in zip(kinds, (256, len(CLASSES)), strict=True))
    print(entropy_table(by_class, CLASSES))
    print(f"\n{expert_table(by_byte, BYTES, args.most)}")
    runs.write_whole(args.run / "experts.html", expert_page(by_byte, BYTES))
    print(f"\nwrote {args.run / 'experts.html'}")


if __name__ == "__main__":
    main()
