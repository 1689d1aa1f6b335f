"""`sweep.best_of`: which cell is taken for each combination of the axes, and what is told of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from dlfer.config.load import load_experiment
from dlfer.config.variations import list_cells
from dlfer.errors import DlferError
from dlfer.metrics.predictions import Predictions, read_predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.report.comparison import write_comparison_report
from dlfer.report.curves import compute_class_rocs
from dlfer.report.sweep import (
    MAX_ROWS,
    describe_best,
    draw_best_rocs,
    draw_best_scores,
    draw_macro_rocs,
    group_best_rows,
)
from dlfer.runs.comparison_record import BestCell, BestCells, ComparisonRecord, SeedEstimate
from dlfer.runs.member_rows import write_member_rows
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.run import Run, create_run
from dlfer.study.members import Plan
from dlfer.study.sweep import SWEEP

pytestmark = pytest.mark.usefixtures("blank_figures")

EXPERIMENT = """\
experiment: {name: small}
finetune:
  data: {source: synthetic_faces}
  image_size: 48
sweep:
  seeds: SEEDS
  grid:
    optimizer:
      adam: {finetune.optimizer.name: adam, finetune.optimizer.learning_rate: 0.001}
      sgd: {finetune.optimizer.name: sgd, finetune.optimizer.learning_rate: 0.01}
    model.dropout: [0.1, 0.2]
    finetune.batch_size: [16, 32]
  best_of: BEST_OF
"""
LABELS = ("a", "b", "c")
N = 90
Hits = Callable[[str, str, int], int | np.ndarray | None]
"""(cell, split, seed) -> how many of the 90 images are right, or which (bool [90]); None: it has not finished."""


def make_predictions(part: str, right: int | np.ndarray, seed: int, first: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    targets = np.arange(N) % 3
    is_right = right if isinstance(right, np.ndarray) else np.arange(N) < right
    guesses = np.where(is_right, targets, (targets + generator.integers(1, 3, N)) % 3)
    probabilities = generator.dirichlet(np.ones(3), N) * 0.3
    probabilities[np.arange(N), guesses] += 0.7
    return Predictions([f"{part}/{i}" for i in range(first, first + N)], LABELS, targets, probabilities)


def finish(run: Run, config, *, hits: Callable[[str], int], parts: tuple[str, ...], first: int = 0) -> None:
    """Write what a run of `epochs` epochs leaves behind: 5 steps each of an epoch, the last but one is kept."""
    predictions = {part: make_predictions(part, hits(part), config.experiment.seed, first) for part in parts}
    for part, some in predictions.items():
        write_predictions(some, run.path / "predictions" / f"{part}.npz")
    metrics = compute_metrics_file(
        predictions, Metrics(protocol="official", banner=None, selected_on="PublicTest", test_opened=0)
    )
    metrics.write(run.path)
    run.update(cost={"finetune_seconds": 3.0, "pretrain_seconds": None})
    epochs = 3 + config.experiment.seed
    (run.path / "finetune").mkdir()
    with open(run.path / "finetune" / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "train_accuracy", "validation_accuracy", "seconds", "images_per_second"])
        for epoch in range(1, epochs + 1):
            writer.writerow([epoch, 0.5, 0.5, 7.0, 5 * config.finetune.batch_size / 7.0])
    run.log("plan", text="EF-FER2: 90 images of 48x48, batch 16, 5 steps an epoch, 3 epochs, 15 steps")
    run.log("plan", text="EF-FER2: 1,234 parameters; adam, rate 0.001 -> 0.001 (constant)")
    run.log("finetune_end", epochs=epochs, kept_epoch=epochs - 1)
    run.finish()


@pytest.fixture
def sweep(tmp_path, monkeypatch, options):
    """A sweep of eight cells whose members are finished already, but those of which `hits` says nothing."""
    monkeypatch.chdir(tmp_path)

    def make(
        hits: Hits,
        *,
        best_of="[optimizer, model.dropout]",
        seeds="[0]",
        parts=("validation", "test"),
        first=None,
        **keys,
    ) -> Path:
        file = tmp_path / "small.yaml"
        file.write_text(EXPERIMENT.replace("SEEDS", seeds).replace("BEST_OF", best_of))
        config = load_experiment(file, {key.replace("__", "."): value for key, value in keys.items()})
        plan = Plan("sweep", {cell.name: cell.overrides for cell in list_cells(config)}, config.sweep.seeds)
        run = create_run(options.out, config, argv=list(options.argv), kind="sweep")
        run.update(smoke=False, use_cache=True)
        members = plan.make_members()
        for member in members:
            made = member.make_config(config)
            if hits(member.arm, "validation", member.seed) is not None:
                member_run = create_run(Path("runs"), made, argv=[])
                own = lambda part, m=member: hits(m.arm, part, m.seed)  # noqa: E731
                finish(member_run, made, hits=own, parts=parts, first=(first or {}).get(member.arm, 0))
                member.path, member.status = str(member_run.path), "finished"
        write_member_rows(run.path, [member.as_row() for member in members])
        return run.path

    return make


@pytest.fixture
def without_page(monkeypatch) -> None:
    """Leave the page and its figures out: they cost more than all the rest."""
    monkeypatch.setattr("dlfer.study.comparison.write_comparison_report", lambda path, **_: path / "report.html")


def read_best(path: Path) -> BestCells | None:
    return ComparisonRecord.require(path).best_of


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def give_hits(table: dict[str, tuple[int, int]]) -> Hits:
    """Return the hits of each cell: (validation, test); of a cell that is not named 40 and 40."""
    return lambda cell, part, seed: table.get(cell, (40, 40))[part == "test"]


SGD_WINS_VALIDATION = {
    "adam, dropout=0.1, batch_size=16": (50, 41),
    "adam, dropout=0.1, batch_size=32": (45, 89),
    "sgd, dropout=0.2, batch_size=16": (60, 70),
    "sgd, dropout=0.2, batch_size=32": (70, 60),
}


@pytest.mark.usefixtures("without_page")
def test_cells_that_were_validated_on_different_images_are_not_ranked_together(sweep, options):
    hits = give_hits({**SGD_WINS_VALIDATION, "adam, dropout=0.1, batch_size=32": (88, 89)})
    first = {"adam, dropout=0.1, batch_size=32": 7, "adam, dropout=0.2, batch_size=32": 7}
    path = sweep(hits, first=first, best_of="[optimizer]")
    SWEEP.resume(path, options)
    found = ComparisonRecord.require(path)
    assert [(row.image_set, row.rank) for row in found.table] == [(1, rank) for rank in range(1, 7)] + [(2, 1), (2, 2)]
    assert [row.arm for row in found.table[6:]] == list(first)
    assert found.table[0].arm == found.reference == "sgd, dropout=0.2, batch_size=32"
    assert describe_best(found).startswith(
        "Best on validation of the 6 cells of set 1 of images by accuracy: sgd, dropout=0.2,"
    )
    assert found.notes[0].startswith(
        "The cells were validated on 2 sets of images, and are ranked within each: metrics on validation of different sets are "
        "not comparable. Set 1: adam, dropout=0.1, batch_size=16;"
    )
    assert "The best of 6 cells of set 1 was chosen on the same images" in found.notes[1]
    assert [row.arm for row in found.best_of.table] == ["sgd, dropout=0.2, batch_size=32"]
    assert "No best cell of: adam; the cells of each were validated on different images." in found.best_of.notes


@pytest.mark.usefixtures("without_page")
def test_without_common_validation_images_no_cell_is_the_best(sweep, options):
    cells = [f"{name}, dropout={rate}, batch_size=16" for name in ("adam", "sgd") for rate in (0.1, 0.2)]
    path = sweep(
        give_hits({}),
        first={cell: 7 * number for number, cell in enumerate(cells)},
        best_of="[]",
        **{"sweep.grid.finetune.batch_size": [16]},
    )
    SWEEP.resume(path, options)
    found = ComparisonRecord.require(path)
    assert [(row.image_set, row.rank) for row in found.table] == [(number, 1) for number in range(1, 5)]
    assert (found.reference, found.paired) == (None, [])
    assert describe_best(found) == "No two cells were validated on the same images, so that none is the best."
    assert not any(note.startswith(("Ranked by", "Not compared")) for note in found.notes)


def test_each_combination_has_the_cell_that_is_best_on_validation_and_its_metrics_on_test(sweep, options, without_page):
    path = SWEEP.resume(sweep(give_hits(SGD_WINS_VALIDATION)), options)
    best = read_best(path)
    assert best.axes == ["optimizer", "model.dropout"]
    assert (best.part, best.judged_on) == ("test", "test")
    assert [(row.values["optimizer"], row.values["model.dropout"]) for row in best.table] == [
        ("adam", "0.1"),
        ("adam", "0.2"),
        ("sgd", "0.1"),
        ("sgd", "0.2"),
    ]
    first, last = best.table[0], best.table[3]
    assert first.arm == "adam, dropout=0.1, batch_size=16"
    assert first.accuracy.value == pytest.approx(41 / 90)
    assert first.ranked_by == pytest.approx(50 / 90)
    assert last.arm == "sgd, dropout=0.2, batch_size=32"
    assert {row.num_cells for row in best.table} == {2}
    assert "The metrics are those on test, which was not used for selection." in best.notes[0]
    made = make_predictions("test", 60, 0)
    for name, oracle in (
        ("macro_precision", precision_score),
        ("macro_recall", recall_score),
        ("macro_f1", f1_score),
    ):
        estimate = last.get(name)
        assert estimate.value == pytest.approx(oracle(made.targets, made.predicted, average="macro"))
        assert estimate.low < estimate.value < estimate.high
        assert estimate.n == 90


def test_the_csv_tells_how_each_cell_was_trained(sweep, options, without_page):
    rows = read_csv(SWEEP.resume(sweep(give_hits(SGD_WINS_VALIDATION)), options) / "best.csv")
    scores = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    assert list(rows[0]) == [
        "axis optimizer",
        "model.dropout",
        "cell",
        "epochs",
        "kept_epoch",
        "optimizer",
        "learning_rate",
        "batch_size",
        "steps_an_epoch",
        "image_size",
        "num_parameters",
        "num_seeds",
        "num_cells",
        "num_planned",
        "ranked_by",
        "part",
        "n",
        *(f"{score}{end}" for score in scores for end in ("", "_low", "_high")),
    ]
    expected = {
        "axis optimizer": "sgd",
        "model.dropout": "0.2",
        "cell": "sgd, dropout=0.2, batch_size=32",
        "epochs": "3",
        "kept_epoch": "2",
        "optimizer": "sgd",
        "learning_rate": "0.01",
        "batch_size": "32",
        "steps_an_epoch": "5",
        "image_size": "48",
        "num_parameters": "1234",
        "num_seeds": "1",
        "num_cells": "2",
        "num_planned": "2",
        "part": "test",
        "n": "90",
    }
    assert {name: rows[3][name] for name in expected} == expected
    assert float(rows[3]["accuracy"]) == pytest.approx(60 / 90)
    assert float(rows[3]["accuracy_low"]) < 60 / 90 < float(rows[3]["accuracy_high"])


def test_of_several_seeds_the_means_choose_and_are_told(sweep, options):
    """batch 32 has the best single seed; batch 16 is better on the mean."""
    validation = {16: (50, 60), 32: (70, 20)}
    test = {16: (30, 50), 32: (80, 80)}

    def hits(cell: str, part: str, seed: int) -> int:
        return (test if part == "test" else validation)[int(cell.rsplit("=", 1)[1])][seed]

    path = SWEEP.resume(sweep(hits, seeds="[0, 1]", best_of="[optimizer]"), options)
    best = read_best(path)
    assert [row.arm for row in best.table] == [
        "adam, dropout=0.1, batch_size=16",
        "sgd, dropout=0.1, batch_size=16",
    ]
    row = best.table[0]
    assert row.seeds == [0, 1]
    assert row.num_cells == 4
    assert row.accuracy.value == pytest.approx(40 / 90)
    made = [make_predictions("test", right, seed) for seed, right in enumerate((30, 50))]
    mean = np.mean([f1_score(some.targets, some.predicted, average="macro") for some in made])
    assert row.macro_f1.value == pytest.approx(mean)
    assert row.macro_f1.sd_over_seeds > 0
    assert (row.epochs, row.kept_epoch, row.steps_an_epoch) == (3.5, 2.5, 5)
    assert any("means over seeds" in note for note in best.notes)
    assert "2 seeds" in (path / "report.html").read_text()
    assert read_csv(path / "best.csv")[0]["num_seeds"] == "2"


@pytest.mark.parametrize(("rank_by", "chosen"), [("accuracy", 16), ("macro_f1", 32)])
def test_the_metric_that_ranks_is_the_one_that_chooses(sweep, options, without_page, rank_by, chosen):
    """Two classes wholly right and the third wholly wrong: 67 % accuracy, against 61 %, but a macro F1 below."""
    two_classes = np.arange(N) % 3 < 2
    path = sweep(lambda cell, part, seed: two_classes if cell.endswith("=16") else 55, sweep__rank_by=rank_by)
    best = read_best(SWEEP.resume(path, options))
    assert [row.arm.rsplit("=", 1)[1] for row in best.table] == [str(chosen)] * 4
    assert f"by {'macro F1' if rank_by == 'macro_f1' else rank_by} on validation" in best.notes[0]


def test_without_a_test_split_the_metrics_are_on_validation_and_it_is_said(sweep, options):
    path = SWEEP.resume(sweep(give_hits(SGD_WINS_VALIDATION), parts=("validation",)), options)
    best = read_best(path)
    assert best.part == "validation"
    assert best.judged_on == "validation (PublicTest, used for selection)"
    assert best.table[0].accuracy.value == best.table[0].ranked_by == pytest.approx(50 / 90)
    assert "too good by an unknown amount" in best.notes[0]
    assert {row["part"] for row in read_csv(path / "best.csv")} == {"validation"}
    page = (path / "report.html").read_text()
    assert "model.dropout: 0.1, on validation (PublicTest, used for selection)" in page
    assert "ROC on validation" in page


@pytest.mark.slow
def test_an_unfinished_cell_is_not_chosen_and_one_without_rivals_is_missing(sweep, options, plan):
    plan |= {"0.1": {"do": "fail"}, "0.2": {"do": "fail"}}
    gone = {
        "adam, dropout=0.1, batch_size=16",
        "sgd, dropout=0.2, batch_size=16",
        "sgd, dropout=0.2, batch_size=32",
    }
    path = sweep(lambda cell, part, seed: None if cell in gone else 40)
    with pytest.raises(DlferError, match="3 of 8 members failed"):
        SWEEP.resume(path, options)
    best = read_best(path)
    assert [(row.arm, row.num_cells, row.num_planned) for row in best.table] == [
        ("adam, dropout=0.1, batch_size=32", 1, 2),
        ("adam, dropout=0.2, batch_size=16", 2, 2),
        ("sgd, dropout=0.1, batch_size=16", 2, 2),
    ]
    assert "No cell has finished of: sgd, 0.2." in best.notes
    assert len(read_csv(path / "best.csv")) == 3
    assert "best of 1 (of 2): adam" in (path / "report.html").read_text()


def test_cells_named_by_themselves_are_not_among_them(sweep, options, without_page):
    hits = give_hits({"alone": (89, 89)})
    best = read_best(SWEEP.resume(sweep(hits, sweep__cells={"alone": {"finetune.epochs": 7}}), options))
    assert "alone" not in [row.arm for row in best.table]
    assert any("named by themselves" in note for note in best.notes)


def test_the_rows_are_in_the_order_of_the_axes_named(sweep, options, without_page):
    best = read_best(SWEEP.resume(sweep(give_hits({}), best_of="[model.dropout, optimizer]"), options))
    found = [tuple(row.values.values()) for row in best.table]
    assert found == [("0.1", "adam"), ("0.1", "sgd"), ("0.2", "adam"), ("0.2", "sgd")]


def test_what_was_not_asked_for_is_not_there(sweep, options):
    path = SWEEP.resume(sweep(give_hits({}), best_of="[]"), options)
    assert read_best(path) is None
    assert not (path / "best.csv").exists()
    assert "Best cells" not in (path / "report.html").read_text()
    assert not list((path / "figures").glob("best*"))


def test_page_and_terminal_have_a_table_for_each_value_of_the_last_of_two_axes(sweep, options, capfd):
    path = SWEEP.resume(sweep(give_hits(SGD_WINS_VALIDATION)), options)
    page = (path / "report.html").read_text()
    assert page.index("Best cells") < page.index("<h3>model.dropout: 0.1, on test</h3>")
    assert page.index("<h3>model.dropout: 0.1, on test</h3>") < page.index("<h3>model.dropout: 0.2, on test</h3>")
    table = page.split("<h3>model.dropout: 0.2, on test</h3>")[1].split("</table>")[0]
    assert table.count('scope="row"') == 2
    for text in (
        "sgd, dropout=0.2, batch_size=32",
        "66.7 %",
        "n = 90",
        "0.01",
        "1,234",
        "best of 2: sgd",
        "macro precision",
    ):
        assert text in table
    assert page.count("data:image/png;base64,") == 6
    shown = capfd.readouterr().err
    assert "model.dropout: 0.2" in shown
    assert "66.7 %" in shown
    with Image.open(path / "figures" / "best_macro_roc.png") as image:
        assert "sgd, dropout 0.2 0." in image.info["Description"]


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_figures")
def test_the_curves_are_those_of_the_chosen_members(sweep, options):
    path = SWEEP.resume(sweep(give_hits(SGD_WINS_VALIDATION), best_of="[optimizer]"), options)
    members = {row["arm"]: Path(row["path"]) for row in read_csv(path / "members.csv")}
    chosen = read_best(path).table[1].arm
    assert chosen == "sgd, dropout=0.2, batch_size=32"
    predictions = read_predictions(members[chosen] / "predictions" / "test.npz")
    area = roc_auc_score(predictions.targets, predictions.probabilities, multi_class="ovr")
    with Image.open(path / "figures" / "best_roc.png") as image:
        assert f"sgd {area:.3f}" in image.info["Description"]
    (members[chosen] / "predictions" / "test.npz").unlink()
    write_comparison_report(path)
    with Image.open(path / "figures" / "best_roc.png") as image:
        assert "1 cells without predictions are left out" in image.info["Title"]
        assert "sgd" not in image.info["Description"]


def make_cell(name: str, value: float | None) -> BestCell:
    estimate = SeedEstimate(value=value, low=value and value - 0.1, high=value and value + 0.05, n=90)
    metrics = dict.fromkeys(("accuracy", "macro_precision", "macro_recall", "macro_f1"), estimate)
    chosen = {"values": {"backbone": name}, "num_cells": 1, "num_planned": 1, "ranked_by": 0.5}
    return BestCell(arm=name, seeds=[0], **chosen, **metrics)


def test_bars_have_the_values_and_their_intervals():
    cells = [make_cell("one", 0.5), make_cell("two", 0.7), make_cell("none", None)]
    best = BestCells(axes=["backbone"], part="test", judged_on="test", table=cells)
    axes = draw_best_scores(group_best_rows(best)).axes[0]
    assert [container.get_label() for container in axes.containers if len(container.get_children()) == 2] == [
        "accuracy",
        "macro precision",
        "macro recall",
        "macro F1",
    ]
    assert sorted({patch.get_height() for patch in axes.patches}) == pytest.approx([50, 70])
    ends = axes.collections[0].get_segments()[0][:, 1]
    assert sorted(ends) == pytest.approx([40, 55])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "two", "none"]


def test_roc_has_a_panel_for_each_cell_and_all_means_in_one():
    several = [make_predictions("test", right, 0) for right in (40, 60, 80, 85)]
    panels = draw_best_rocs([(f"cell {i}", some) for i, some in enumerate(several)]).axes
    assert [axes.get_title("left") for axes in panels] == [f"cell {i}" for i in range(4)]
    area = roc_auc_score(several[0].targets == 1, several[0].probabilities[:, 1])
    assert f"b, {area:.3f}" in [text.get_text() for text in panels[0].get_legend().get_texts()]
    figure = draw_macro_rocs([(f"cell {i}", compute_class_rocs(some)[1]) for i, some in enumerate(several)])
    mean = roc_auc_score(several[3].targets, several[3].probabilities, multi_class="ovr")
    assert f"cell 3, {mean:.3f}" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_as_many_mean_curves_as_are_drawn_look_different():
    _, macro = compute_class_rocs(make_predictions("test", 60, 0))
    lines = draw_macro_rocs([(f"cell {i}", macro) for i in range(MAX_ROWS)]).axes[0].get_lines()[1:]
    assert len({(line.get_color(), str(line.get_linestyle())) for line in lines}) == MAX_ROWS


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_figures")
def test_of_many_rows_the_first_are_drawn_and_it_is_said(sweep, options):
    dropouts = [i / 100 for i in range(9)]
    grid = {"model.dropout": dropouts, "finetune.image_size": [32, 48]}
    path = sweep(give_hits({}), best_of="[model.dropout, finetune.image_size]", sweep__grid=grid)
    page = (SWEEP.resume(path, options) / "report.html").read_text()
    assert "The figures show the first 16 of 18 rows." in page
    assert len(read_best(path).table) == 18
    with Image.open(path / "figures" / "best_scores.png") as image:
        assert "the first 16 of 18 rows" in image.info["Title"]
        assert image.info["Description"].count("accuracy") == 16


@pytest.mark.slow
def test_a_page_of_before_there_was_a_best_of_is_still_made(sweep, options):
    path = SWEEP.resume(sweep(give_hits({})), options)
    values = json.loads((path / "comparison.json").read_text())
    del values["best_of"]
    (path / "comparison.json").write_text(json.dumps(values))
    assert "Best cells" not in write_comparison_report(path).read_text()
