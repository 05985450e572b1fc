import json
import re

import numpy as np
import pytest

from mvit_jax.analysis import plots, report, run_data
from mvit_jax.analysis.plots import Curve
from mvit_jax.models.cost import cost
from mvit_jax.training.run import workdir
from tests.support import pages, tiny
from tests.support.pages import NAMES, Page


@pytest.fixture(scope="module")
def html():
    return report.report(pages.run())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_headline_figures_are_those_of_the_evaluation(page):
    total = cost(pages.run().model)
    assert page.ids["top1"] == "66.7 %" and page.ids["top5"] == "100.0 %"
    assert page.ids["mean_class"] == "67.1 %"
    assert page.ids["videos"] == "21" and page.ids["views"] == "2 x 1"
    assert int(page.ids["parameters"].replace(",", "")) == total.parameters
    number, unit = page.ids["multiply_adds"].split()
    shown = total.multiply_adds / {"M": 1e6, "G": 1e9}[unit]
    assert float(number) == pytest.approx(shown, abs=0.05)  # a decimal place
    assert page.ids["seconds"] == "1 h 02 min" and page.ids["steps"] == "60"


def test_the_test_with_shuffled_frames_is_shown_beside_the_test(page):
    assert page.ids["shuffled"] == "41.2 %"
    words = " ".join(page.text.split())
    assert "25.4 points less" in words and "Table 9" in words


def test_names_are_escaped_in_text_and_figures(html, page):
    assert page.count("script") == 0 and page.count("b") == 0 and page.count("i") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for name in (*NAMES, "/runs/<a>&b", "/data/<u>.mp4: the file is empty"):
        assert plots.truncate(name) in page.text or name in page.text
    assert "videos/<img src=x onerror=alert(1)>.mp4" in page.text
    # Names in a figure are neither formulas nor references nor colours.
    figure = html[html.index('<svg role="img" aria-label="Confusion') :]
    assert plots.truncate("$x_{1$ url(#a) #1b1c1d").replace("&", "&amp;") in figure


def test_the_report_loads_no_external_resources(html, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "script", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_every_image_has_a_description_and_ids_are_unique(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6 and all(image["alt"] for image in images)
    figures = [a for tag, a in page.tags if tag == "svg"]
    labels = [figure["aria-label"] for figure in figures]
    assert len(set(labels)) == len(labels) == 7
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all(link.removeprefix("#") in ids for link in links)
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1


def test_the_most_confused_pairs_are_the_largest_off_diagonal_entries():
    random = np.random.default_rng(0)
    confusion = random.integers(0, 9, (6, 6))
    names = list("abcdef")
    pairs = report.most_confused_pairs(confusion.tolist(), names, limit=5)
    naive = sorted((-confusion[i, j], i, j) for i, j in np.ndindex(6, 6) if i != j)[:5]
    assert [pair[:3] for pair in pairs] == [(names[i], names[j], -n) for n, i, j in naive]
    for truth, _, count, share in pairs:
        assert share == pytest.approx(100 * count / confusion[names.index(truth)].sum())
    assert report.most_confused_pairs([[2, 0], [0, 3]], ["a", "b"]) == []


def test_an_untested_run_shows_the_evaluate_command():
    page = Page(report.report(pages.run(evaluations=[], sheet=None)))
    assert "Not tested yet" in page.text
    assert "python -m mvit_jax.evaluate '--workdir=/runs/<a>&b'" in page.text
    assert page.count("svg") == 5 and page.count("img") == 0 and "top1" not in page.ids


def test_goodput_is_shown_if_times_were_recorded(page):
    assert page.ids["goodput"] == "80.0 %"  # 3,000 of 3,750 s
    assert "Of 1 h 02 min of wall time (1 start), 80.0 % went into training steps" in page.text
    html = report.report(pages.run(spent={}))
    assert "goodput" not in Page(html).ids and "Where the time went" not in html


def test_a_folder_of_weights_alone_has_a_report():
    bare = pages.run(starts=[], train=[], val=[], seconds=0.0, spent={}, defaults=None)
    page = Page(report.report(bare))
    assert "no history of its training" in page.text and "seconds" not in page.ids
    assert page.ids["top1"] == "66.7 %" and page.count("svg") == 2
    assert Page(report.report(pages.run(model=None))).ids["top1"] == "66.7 %"


def test_missing_mistakes_and_maps_are_stated():
    sheet = {"examples": [], "mistakes": [], "wrong": 0, "no_grad_cam": "it <hides>"}
    page = Page(report.report(pages.run(sheet=sheet)))
    assert "all videos were classified correctly" in page.ids["no_mistakes"]
    assert "Grad-CAM is not shown: it <hides>." in " ".join(page.text.split())


def test_clips_of_an_earlier_version_are_not_shown(digits, tmp_path):
    """Their pictures have attention rollout too, which the caption does not mention."""
    workdir.record_config(tiny.config(digits), tmp_path)
    evaluation, sheet = pages.evaluation(), pages.run().sheet
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    run_data.write_example_clips(tmp_path / "clips.json", sheet, evaluation)
    assert run_data.read(tmp_path).sheet == sheet | {"of": report.identify(evaluation)}
    old = {("no_attention" if key == "no_grad_cam" else key): entry for key, entry in sheet.items()}
    run_data.write_example_clips(tmp_path / "clips.json", old, evaluation)
    assert run_data.read(tmp_path).sheet is None


def test_shuffled_frames_of_another_checkpoint_are_not_compared():
    evaluations = [pages.evaluation(), pages.evaluation(shuffled_frames=True, step=40)]
    run = pages.run(evaluations=evaluations)
    assert run.shuffled is None
    assert "--shuffle_frames" in Page(report.report(run)).text


def test_evaluations_without_a_mean_class_accuracy_are_shown():
    """Results of multi-label data, and of older versions."""
    test = pages.evaluation()
    del test["mean_class"]
    page = Page(report.report(pages.run(evaluations=[test])))
    assert "mean_class" not in page.ids and page.ids["top1"] == "66.7 %"


def test_many_classes_are_named_only_in_tables():
    names = [f"class {i} of many" for i in range(400)]
    confusion = np.diag(np.full(400, 9)) + np.eye(400, k=1, dtype=int)
    shares = [90.0] * 399 + [100.0]
    test = pages.evaluation(classes=names, confusion=confusion.tolist(), per_class=shares)
    sheet = pages.run().sheet | {"mistakes": []}
    html = report.report(pages.run(evaluations=[test], sheet=sheet))
    begin = html.index('aria-label="Confusion matrix"')
    assert "of many" not in html[begin : html.index("</svg>", begin)]
    text = Page(html).text
    assert all(name in text for name in names) and len(html) < 1e6


def test_commands_reproduce_their_evaluations():
    run = pages.run(folder="runs/a")
    command = "python -m mvit_jax.evaluate --workdir=runs/a"
    assert report.evaluate_command(run, None) == command
    e = pages.evaluation(list="/data/val.csv", checkpoint="best", clips=5, shuffled_frames=True)
    expected = f"{command} --list=val --which=best --clips=5 --shuffle_frames"
    assert report.evaluate_command(run, e) == expected
    weights = pages.run(folder="w", config=run.config | {"data.folder": None})
    assert report.evaluate_command(weights, None).endswith("--workdir=w --data=DIR")


def test_a_comparison_shows_gaps_and_differing_config_keys():
    first = pages.run(folder="/x/a")
    second = pages.run(
        folder="/x/b", config=first.config | {"optim.lr": 1e-4}, evaluations=[], starts=[],
        train=[], val=[], model=None,
    )  # fmt: skip
    table = report.comparison_table([first, second])
    lines = [line.split() for line in table.splitlines()]
    assert lines[2][0] == "a" and "66.67" in lines[2] and "41.25" in lines[2]
    assert lines[3][0] == "b" and lines[3].count("–") == 9
    assert ["optim.lr", "0.002", "0.0001"] in lines
    assert not any(line and line[0] == "data.folder" for line in lines)
    page = Page(report.comparison([first, second]))
    assert "66.67" in page.ids["runs"] and page.count("svg") == 2
    assert page.ids["differing"].split()[-3:] == ["optim.lr", "0.002", "0.0001"]
    assert "Without a history (metrics.jsonl): b." in page.text


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, False),
        ({"list": "/elsewhere/test.csv"}, False),
        ({"list": "/data/val.csv"}, True),
        ({"videos": 20}, True),
        ({"videos": 20, "left_out": ["/data/<u>.mp4: the file is empty", "another"]}, False),
        ({"classes": [*NAMES[:-1], "another"]}, True),
        ({"list": "/data/val.csv", "list_checksum": 7}, False),
        ({"list_checksum": 8}, True),
    ],
)
def test_a_comparison_of_different_lists_has_a_note(change, differs):
    checksum = {"list_checksum": 7} if "list_checksum" in change else {}
    tests = [pages.evaluation(**checksum), pages.evaluation(**change)]
    runs = [pages.run(folder=f"/x/{n}", evaluations=[t]) for n, t in zip("ab", tests, strict=True)]
    runs.append(pages.run(folder="/x/untested", evaluations=[]))
    note = "the runs were tested on different lists, so their accuracies do not compare: a on test"
    assert (note in report.comparison_table(runs)) == differs
    assert (note in " ".join(Page(report.comparison(runs)).text.split())) == differs


def test_folders_of_the_same_name_are_shown_with_their_paths():
    runs = [pages.run(folder="/x/a"), pages.run(folder="/y/a")]
    assert report.distinct_names(runs) == ["/x/a", "/y/a"]


def test_a_curve_of_one_point_has_a_marker():
    svg = plots.svg(plots.curves([Curve("loss", [20], [1.0])], "loss"), "Loss", "loss")
    assert "<use" in svg  # a marker: a line of one point has no length


def test_a_figure_is_written_atomically(tmp_path):
    (tmp_path / "taken.png").mkdir()
    figure = plots.class_accuracy([50.0, None], ["a", "b"], "title")
    with pytest.raises(ValueError, match=r"taken\.png cannot be written"):
        plots.save(figure, tmp_path / "taken.png")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
