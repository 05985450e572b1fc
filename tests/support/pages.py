"""A run with names that must be escaped in reports, and a parser of HTML pages."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

from mvit_jax.analysis.report import Run
from mvit_jax.models.variants import variant
from tests.support.tiny import MODEL

NAMES = ['<b>&"', "</svg><script>document.title='x'</script>", "$x_{1$ url(#a) #1b1c1d"]
# Rows are true classes.
CONFUSION = [[3, 4, 0], [0, 5, 1], [2, 0, 6]]
VOID = {"meta", "img", "br", "link", "input"}


def picture(width: int = 40, height: int = 20) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(buffer, "WEBP")
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def evaluation(**changes):
    return {
        "list": "/data/<i>/test.csv", "checkpoint": "last", "step": 60, "clips": 2, "crops": 1,
        "shuffled_frames": False, "classes": NAMES, "top1": 66.6667, "top5": 100.0,
        "mean_class": 67.063, "videos": 21, "left_out": ["/data/<u>.mp4: the file is empty"],
        "per_class": [42.857, 83.333, 75.0], "confusion": CONFUSION,
    } | changes  # fmt: skip


def clip(truth: int, predicted: int, probability: float):
    return {
        "video": "videos/<img src=x onerror=alert(1)>.mp4", "truth": truth, "predicted": predicted,
        "probability": probability, "pictures": [picture(), picture()],
    }  # fmt: skip


def run(**changes) -> Run:
    steps = range(20, 80, 20)
    values = {
        "folder": "/runs/<a>&b",
        "config": {
            "model.variant": "mvit_b_16x4", "optim.lr": 2e-3, "data.folder": "/data",
            "data.test_list": "test.csv", "data.val_list": "val.csv",
            "data.train_list": "train.csv", "eval.clips": 2, "eval.crops": 1,
        },
        "defaults": {"model.variant": "mvit_b_16x4", "optim.lr": 1.6e-3, "data.folder": None},
        "model": variant("mvit_b_16x4", num_classes=3, **MODEL),
        "starts": [{
            "kind": "start", "step": 0, "time": 1.7e9, "videos": 2000, "classes": 3, "devices": 4,
            "device_kind": "TPU v5 lite", "backend": "tpu", "cpus": 112, "python": "3.11.7",
            "versions": {"jax": "0.10.2"}, "command": "python -m mvit_jax.train --workdir='<a>&b'",
        }],
        "train": [
            {"step": s, "loss": 60 / s, "accuracy": s / 1.0, "grad_norm": 1.5,
             "learning_rate": 1e-3, "param_norm": 40.0, "clips_per_second": 9.0}
            for s in steps
        ],
        "val": [{"step": s, "top1": s / 2, "top5": 99.0} for s in steps],
        "seconds": 3725.0,
        "spent": {
            "start": 40.0, "compile": 60.0, "step": 3000.0, "data": 200.0, "checkpoint": 20.0,
            "validation": 175.0, "rest": 5.0, "repeated": 250.0,
        },
        "evaluations": [evaluation(), evaluation(shuffled_frames=True, top1=41.25)],
        "sheet": {
            "examples": [clip(0, 0, 0.91), clip(1, 1, 0.5)],
            "mistakes": [clip(0, 1, 0.875)], "wrong": 7, "no_grad_cam": None,
        },
    }  # fmt: skip
    return Run(**(values | changes))


class Page(HTMLParser):
    """Text of a page, text of each id, and tags; asserts that all tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.text = ""
        self.ids: dict[str, str] = {}
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.handle_data(" ")
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            return
        self.text += data
        for _, name in self.open:
            if name:
                self.ids[name] = self.ids.get(name, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)
