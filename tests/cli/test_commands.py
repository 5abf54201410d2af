"""Commands against a fake server on a loopback port."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import rich.console
from typer.testing import CliRunner, Result

import camserve
from camserve import batches, catalogue
from camserve.v1 import explain_pb2 as pb
from camserve_cli import rich_tables
from camserve_cli.app import app
from camserve_cli.saved_maps import stems
from camserve_server.errors import Expired
from camserve_server.service import status
from tests.client.fake_server import Servicer
from tests.processes import CAMSERVE, LIMIT_S, started


def run(*arguments: object, **env: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200", **env})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "dog.jpg"
    path.parent.mkdir()
    PIL.Image.new("RGB", (50, 30), "teal").save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def written(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_boxes_and_masks_are_sent_as_the_truth(address: str, servicer: Servicer, photo: Path, out: Path) -> None:
    arguments = ("explain", photo, "--address", address, "--out", out)
    mask = photo.parent / "mask.png"
    PIL.Image.fromarray(np.array([[0, 255], [0, 3]], np.uint8)).save(mask)
    assert run(*arguments, "--box", "0,0,25,30", "--box", "5,6,7,8.5", "--mask", mask).exit_code == 0
    truth = servicer.requests[-1].truth
    assert [(box.left, box.right) for box in truth.boxes] == [(0, 0.5), (0.1, 0.14)]
    np.testing.assert_array_equal(np.frombuffer(truth.mask.data, "<f4").reshape(truth.mask.shape), [[0, 1], [0, 1]])
    for wrong in ("0,0,25", "0,0,25,x"):
        assert run(*arguments, "--box", wrong).exit_code == 2
    missing = run(*arguments, "--mask", photo.parent / "none.png")
    assert (missing.exit_code, missing.stderr) == (
        1,
        f"error: No such file or directory: {photo.parent / 'none.png'}\n",
    )


def test_error_names_the_option_that_the_user_typed(address: str, servicer: Servicer, photo: Path, out: Path) -> None:
    servicer.before = lambda context: context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, "target_top_k must lie in [0, 5], not 9"
    )
    result = run("explain", photo, "--address", address, "--out", out, "--top-k", 9)
    assert result.stderr == f"error: {photo}: --top-k must lie in [0, 5], not 9\n"


def test_format_of_maps_is_sent(address: str, servicer: Servicer, photo: Path, out: Path) -> None:
    arguments = ("--address", address, "--map-dtype", "uint8", "--native-maps")
    for command in (
        ("explain", photo, "--out", out),
        ("evaluate", photo, "--method", "opti-cam"),
        ("evaluate", photo, "--method", "opti-cam", "--metric", "insertion", "--csv", out / "scores.csv"),
        ("bench", "--method", "fake-cam", "--image", photo, "--in-flight", 1, "--warmup", 0, "--duration", 0.1),
    ):
        out.mkdir(exist_ok=True)
        result = run(*command, *arguments)
        assert result.exit_code == 0, result.output
        formats = [each.map_format for each in servicer.requests if hasattr(each, "map_format")]
        assert formats[-1] == pb.MapFormat(dtype="uint8", native=True), command


@pytest.mark.parametrize(
    "command",
    [
        ("explain", "PHOTO", "--out", "OUT"),
        ("evaluate", "PHOTO", "--method", "opti-cam"),
        ("evaluate", "PHOTO", "--method", "opti-cam", "--metric", "insertion", "--csv", "OUT/scores.csv"),
        ("sanity", "PHOTO", "--out", "OUT/maps.png"),
        ("bench", "--method", "fake-cam", "--image", "PHOTO", "--in-flight", 1, "--warmup", 0, "--duration", 0.1),
    ],
    ids=["explain", "evaluate", "evaluate --csv", "sanity", "bench"],
)
def test_precision_is_sent(
    address: str, servicer: Servicer, photo: Path, out: Path, command: tuple[object, ...]
) -> None:
    out.mkdir(exist_ok=True)
    arguments = [str(each).replace("PHOTO", str(photo)).replace("OUT", str(out)) for each in command]
    run(*arguments, "--address", address, "--precision", "bf16")
    assert {each.precision for each in servicer.requests if hasattr(each, "precision")} == {"bf16"}


def test_explain_writes_files_and_prints_a_table(
    address: str, servicer: Servicer, photo: Path, out: Path, ramp: np.ndarray
) -> None:
    result = run(
        *("explain", photo, "--address", address, "--out", out, "--method", "opti-cam", "--model", "m"),
        *("--target", "8", "--layer", "a", "--layer", "b", "--seed", 5, "--metric", "insertion"),
        *("--param", "steps=20", "--param", "norm=max", "--param", "soft=true"),
    )
    assert result.exit_code == 0, result.stderr
    assert written(out) == ["dog.json", "dog.npy", "dog.png"]
    np.testing.assert_array_equal(np.load(out / "dog.npy"), ramp)
    with PIL.Image.open(out / "dog.png") as overlay:
        assert overlay.size == (50, 30)
    for text in ("hen (8)", "0.750", "12", "0.02 s", "insertion", "0.25"):
        assert text in result.stdout
    assert "warning:" in result.stderr
    request = servicer.requests[-1]
    method = request.method
    assert (request.model, method.name, method.layers, method.seed) == ("m", "opti-cam", ["a", "b"], 5)
    assert dict(method.parameters.items()) == {"steps": 20, "norm": "max", "soft": True}
    assert request.targets[0].index == 8


def test_explain_writes_a_record(address: str, photo: Path, out: Path) -> None:
    arguments = ("explain", photo, "--address", address, "--out", out, "--metric", "insertion")
    line = json.loads(run(*arguments, "--json").stdout)
    record = json.loads((out / "dog.json").read_text(encoding="utf-8"))
    assert list(record) == ["image", "maps", "predictions", "cost", "receipt", "request_id"]
    [entry] = record["maps"]
    assert list(entry) == ["saliency", "overlay", "target", "share", "left_out", "scores", "warnings"]
    assert (entry["saliency"], entry["overlay"]) == ("dog.npy", "dog.png")
    flat = {**record, **entry, "record": str(out / "dog.json")}
    del flat["maps"]
    assert flat | {name: str(out / flat[name]) for name in ("saliency", "overlay")} == line


def test_map_of_a_method_that_stopped_early_has_a_warning(
    address: str, servicer: Servicer, photo: Path, out: Path
) -> None:
    arguments = ("explain", photo, "--address", address, "--out", out, "--budget", 7)
    assert (
        f"warning: {photo}: tabby, cat (281): the method stopped early; the map contains 25 % of the full sum\n"
        in run(*arguments).stderr
    )
    assert servicer.requests[-1].budget == 7
    assert json.loads(run(*arguments, "--json").stdout)["share"] == 0.25
    assert "stopped early" not in run(*arguments[:-2]).stderr
    run("evaluate", photo, "--address", address, "--method", "x", "--budget", 8)
    assert servicer.requests[-1].budget == 8


def test_explain_prints_json_lines(address: str, photo: Path, out: Path) -> None:
    result = run("explain", photo, photo, "--address", address, "--out", out, "--metric", "insertion", "--json")
    assert result.exit_code == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["image"] == str(photo)
    assert first["saliency"] == str(out / "dog.npy")
    assert second["overlay"] == str(out / "dog-2.png")
    assert first["target"] == {"index": 281, "label": "tabby, cat", "probability": 0.75, "logit": 4.5}
    assert first["scores"] == {"insertion": 0.25}
    assert first["cost"]["rows"] == 12
    assert first["receipt"]["method"] == "poly-cam"
    assert first["warnings"] == ["degenerate: the map is a ramp"]
    assert len(first["predictions"]) == 2
    assert first["request_id"] == "given"


def test_each_target_has_its_own_files(address: str, photo: Path, out: Path) -> None:
    result = run("explain", photo, "--address", address, "--out", out, "--target", "7", "--target", "hen", "--json")
    assert written(out) == ["dog.7.npy", "dog.7.png", "dog.8.npy", "dog.8.png", "dog.json"]
    assert [json.loads(line)["target"]["label"] for line in result.stdout.splitlines()] == ["cock", "hen"]
    record = json.loads((out / "dog.json").read_text(encoding="utf-8"))
    assert [each["saliency"] for each in record["maps"]] == ["dog.7.npy", "dog.8.npy"]
    assert record["receipt"]["targets"] == [7, 8]


def test_top_k_explains_the_most_probable_classes(address: str, servicer: Servicer, photo: Path, out: Path) -> None:
    assert run("explain", photo, "--address", address, "--out", out, "--top-k", 2).exit_code == 0
    assert servicer.requests[-1].target_top_k == 2
    assert written(out) == ["dog.281.npy", "dog.281.png", "dog.8.npy", "dog.8.png", "dog.json"]


def test_other_images_continue_after_a_failure(address: str, servicer: Servicer, photo: Path, out: Path) -> None:
    servicer.before = lambda context: (
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unreadable") if len(servicer.requests) == 1 else None
    )
    result = run("explain", photo, "none.jpg", photo, "--address", address, "--out", out, "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {photo}: unreadable",
        "error: none.jpg: No such file or directory: none.jpg",
    ]
    assert [json.loads(line)["overlay"] for line in result.stdout.splitlines()] == [str(out / "dog-2.png")]


def test_failures_of_the_same_kind_are_one_line(address: str, photo: Path, out: Path) -> None:
    missing = [photo.with_name(f"{name}.jpg") for name in "abc"]
    result = run("explain", *missing, photo, photo.parent, "--address", address, "--out", out)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {missing[0]}: No such file or directory: {missing[0]} (2 more: FileNotFoundError)",
        f"error: {photo.parent}: Is a directory: {photo.parent}",
    ]


@pytest.mark.slow
def test_many_images_wait_for_a_busy_server_without_a_deadline(
    address: str, servicer: Servicer, photo: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MIN_RETRY_WAIT_S", 0.001)
    error = Expired("too many rows run before", reason="DEADLINE_UNREACHABLE", retry_after_s=0.01)
    left: list[float | None] = []

    def refuse_six(context: Any) -> None:
        left.append(context.time_remaining())
        if len(left) <= 6:
            context.set_trailing_metadata(status.trailing_metadata(error, "given"))
            context.abort(status.code(error), str(error))

    servicer.before = refuse_six
    result = run("explain", photo, photo, "--address", address, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert all(each is None or each > 1e6 for each in left)
    assert len(left) == 8
    assert run("explain", photo, photo, "--address", address, "--out", out, "--timeout", 40).exit_code == 0
    assert run("explain", photo, "--address", address, "--out", out).exit_code == 0
    assert left[8:] == [pytest.approx(each, abs=10) for each in (40, 40, 300)]


def test_tables_in_a_file_are_not_wrapped(address: str, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / ("long" * 30)
    result = CliRunner().invoke(app, ["explain", str(photo), "--address", address, "--out", str(out)])
    assert len(result.stdout.splitlines()) == 2, result.stdout
    assert result.stdout.splitlines()[1].rstrip().endswith(str(out / "dog.png"))


def test_stems_are_distinct_and_replace_no_image(tmp_path: Path) -> None:
    paths = ["a/dog.jpg", "b/dog.jpg", "c/Dog.png", "dog-2.jpg", "e/cat.gif"]
    assert stems([Path(path) for path in paths], Path("out")) == ["dog", "dog-2", "Dog-3", "dog-2-2", "cat"]
    here = [tmp_path / name for name in ("cat.png", "dog.jpg", "hen.7.png", "hen.gif")]
    assert stems(here, tmp_path) == ["cat-2", "dog", "hen.7-2", "hen-2"]


def test_json_labels_beside_an_image_are_kept(address: str, photo: Path) -> None:
    labels = photo.with_suffix(".json")
    labels.write_text('{"version": "5.1", "shapes": []}')
    for _ in range(2):  # the second run replaces the files of the first
        assert run("explain", photo, "--address", address, "--out", photo.parent).exit_code == 0
        assert written(photo.parent) == ["dog-2.json", "dog-2.npy", "dog-2.png", "dog.jpg", "dog.json"]
    assert json.loads(labels.read_text())["shapes"] == []


def test_overlay_does_not_replace_its_image(address: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    PIL.Image.new("RGB", (9, 9), "teal").save(path)
    before = path.read_bytes()
    assert run("explain", path, "--address", address, "--out", tmp_path).exit_code == 0
    assert path.read_bytes() == before
    assert written(tmp_path) == ["cat-2.json", "cat-2.npy", "cat-2.png", "cat.png"]


def test_progress_is_written_to_stderr_only(address: str, photo: Path, out: Path) -> None:
    result = run("explain", photo, "--address", address, "--out", out, "--json", FORCE_COLOR="1")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.stderr)
    assert "12 of 12 rows" in plain
    assert "explain, level 2 of 2 (shallow)" in plain
    assert json.loads(result.stdout)


def test_evaluate_scores_a_file_or_a_method(
    address: str, servicer: Servicer, photo: Path, tmp_path: Path, ramp: np.ndarray
) -> None:
    np.save(tmp_path / "map.npy", ramp)
    arguments = ("evaluate", photo, "--address", address)
    result = run(*arguments, "--saliency", tmp_path / "map.npy", "--target", "hen", "--json")
    record = json.loads(result.stdout)
    assert record["scores"] == {"insertion": 0.25, "deletion": 0.25, "average-gain": 0.25}
    assert record["curves"] == {"insertion": [0, 0.25, 0.5]}
    assert record["target"]["label"] == "hen"
    result = run(*arguments, "--method", "poly-cam", "--metric", "average-gain")
    assert result.exit_code == 0
    assert re.search(r"average-gain +0\.25 +%", result.stdout)
    assert [metric.name for metric in servicer.requests[-1].metrics] == ["average-gain"]


@pytest.mark.slow
def test_evaluate_reports_errors_in_one_line(address: str, photo: Path, tmp_path: Path, ramp: np.ndarray) -> None:
    (tmp_path / "map.npy").write_bytes(b"no array")
    np.savez(tmp_path / "maps.npz", a=ramp)
    arguments = ("evaluate", photo, "--address", address)
    for wrong, message in [
        ((), "expected either saliency or method"),
        (("--saliency", tmp_path / "map.npy"), "is not a NumPy array file"),
        (("--saliency", tmp_path / "maps.npz"), "one array of real numbers"),
        (("--saliency", tmp_path / "none.npy"), "No such file"),
    ]:
        result = run(*arguments, *wrong)
        assert result.exit_code == 1
        assert re.fullmatch(r"error: [^\n]*\n", result.stderr)
        assert message in result.stderr


def lines(result: Result) -> list[str]:
    """Return the lines of a table with single spaces between the columns."""
    assert result.exit_code == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_list_models(address: str) -> None:
    result = run("list", "models", "--address", address)
    for message in ("first", "embedded:first", "3 × 8 × 9 → 3 classes, softmax", "deep[1]", "methods: opti-cam"):
        assert message in result.stdout
    assert "no gradient passes: RuntimeError: no gradients" in result.stdout
    assert "warning: camserve runs it with batch size 1" in result.stdout


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (("a", "b", "c"), "all methods"),
        (("a", "b"), "all methods except c"),
        (("b",), "methods: b"),
        ((), "no methods"),
    ],
)
def test_methods_of_a_model_are_summarised(served: tuple[str, ...], message: str) -> None:
    methods = catalogue.methods(pb.ListMethodsResponse(methods=[pb.Method(name=name) for name in "abc"]))
    [model] = catalogue.models(pb.ListModelsResponse(models=[pb.Model(name="m", input_size=[1, 1], methods=served)]))
    assert rich_tables.served_methods(model, methods) == message


def test_list_layers(address: str) -> None:
    assert lines(run("list", "layers", "--address", address))[1:4] == [
        "stem 2,048 8 × 9 yes",
        "shallow 2 4 × 6 1 several",
        "deep[1] 4 2 × 3 one, several",
    ]


def test_list_methods(address: str, servicer: Servicer) -> None:
    result = lines(run("list", "methods", "--address", address))
    assert servicer.requests[-1].model == "first", "so that costs are always shown"
    for message in (
        "opti-cam Opti-CAM, arXiv:0 1,101 rows",
        "one layer + 1,050 per further target",
        "can stop early; seeded",
        "poly-cam Poly-CAM, arXiv:1",
        "unavailable on first: no such layers",
        "fake-cam Fake-CAM 1 row",
        "no layers; needs a class all targets in one pass",
        "the same for every class",
        "cost on first with its default layers and default parameters",
        "opti-cam",
        "steps integer ≥ 1 50 How many.",
        'norm max | range "max"',
    ):
        assert message in result


@pytest.mark.parametrize("columns", [80, 120])
def test_list_methods_fits_the_terminal(address: str, columns: int) -> None:
    result = run("list", "methods", "--address", address, COLUMNS=str(columns))
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "arXiv:0" in result.stdout


def test_list_one_method(address: str) -> None:
    result = run("list", "methods", "opti-cam", "--address", address)
    assert result.stdout.startswith(
        "opti-cam: Opti-CAM, arXiv:0\nA mask that is optimised.\none layer\ncan stop early; seeded\n"
        "on first: at most 1,101 rows, + 1,050 per further target\n\nWhere time is plenty.\n\n"
    )
    assert "  S = n( Σ_k A_k [k] )\n" in re.sub(" +\n", "\n", result.stdout)
    assert "poly-cam" not in result.stdout
    assert "\nunavailable on first: no such layers\n" in run("list", "methods", "poly-cam", "--address", address).stdout
    result = run("list", "methods", "no-cam", "--address", address)
    assert result.stderr == "error: there is no method 'no-cam'; there are: opti-cam, poly-cam, fake-cam\n"
    assert run("list", "methods", "--model", "other", "--address", address).exit_code == 1


def test_list_metrics(address: str) -> None:
    assert "higher is better; at most 100 rows" in run("list", "metrics", "insertion", "--address", address).stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": 1}, "lower is better, in %; at most 1 row"),
        ({}, "lower is better, in %; at most 0 rows"),
        ({"maps": 10}, "lower is better, in %; at most 10 more maps"),
        ({"rows": 2, "maps": 1}, "lower is better, in %; at most 2 rows and 1 more map"),
        (
            {"needs_truth": True},
            "lower is better, in %; at most 0 rows\nneeds the position of the target (boxes or a mask)",
        ),
    ],
)
def test_cost_and_needs_of_a_metric_are_listed(more: dict[str, Any], message: str) -> None:
    (metric,) = catalogue.metrics(pb.ListMetricsResponse(metrics=[pb.Metric(name="m", title="M", unit="%", **more)]))
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(rich_tables.metric_table([metric]))
    lines = [line.strip().removeprefix("m ").strip() for line in console.export_text().splitlines()]
    assert message in "\n".join(lines)


@pytest.mark.parametrize(
    ("minimum", "maximum", "message"),
    [
        (None, None, "number"),
        (0, None, "number ≥ 0"),
        (None, 0.5, "number ≤ 0.5"),
        (0, 1, "number in [0, 1]"),
        (1e-6, 1e6, "number in [1e-06, 1000000]"),
    ],
)
def test_allowed_values_of_a_parameter_are_listed(minimum: float | None, maximum: float | None, message: str) -> None:
    assert rich_tables.allowed_values(camserve.Parameter("a", "number", 0, minimum, maximum, (), "")) == message


@pytest.mark.parametrize("what", ["models", "layers", "methods", "metrics"])
def test_list_json(address: str, what: str) -> None:
    result = run("list", what, "--address", address, "--json")
    names = [json.loads(line)["name"] for line in result.stdout.splitlines()]
    assert all(names)
    one = run("list", what, names[-1], "--address", address, "--json")
    assert [json.loads(line)["name"] for line in one.stdout.splitlines()] == names[-1:]


@pytest.mark.slow
def test_connection_errors_are_one_line(photo: Path, out: Path) -> None:
    for command in (("list", "models"), ("evaluate", photo, "--method", "x"), ("explain", photo, "--out", out)):
        result = run(*command, "--address", "127.0.0.1:1")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert re.fullmatch(r"error: [^\n]*127\.0\.0\.1:1[^\n]*\n", result.stderr)
    assert not out.exists()


def test_wrong_usage_exits_with_status_2(photo: Path) -> None:
    assert run("explain").exit_code == 2
    assert run("explain", photo, "--param", "steps").exit_code == 2
    assert run("explain", photo, "--seed", "-1").exit_code == 2
    assert run("explain", photo, "--top-k", 2, "--target", 1).exit_code == 2
    assert run("replay", photo).exit_code == 2
    assert run("list", "everything").exit_code == 2


def test_version() -> None:
    assert run("--version").stdout.strip() == f"camserve {camserve.__version__}"


@pytest.mark.slow
def test_ctrl_c_cancels_the_request_and_exits_with_status_130(
    address: str, servicer: Servicer, photo: Path, out: Path
) -> None:
    command = [*CAMSERVE, "explain", str(photo), "--model", "slow", "--address", address, "--out", str(out)]
    with started(command, stderr=subprocess.PIPE) as process:
        assert servicer.started.wait(LIMIT_S)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, error) == (130, "cancelled\n")
    assert servicer.cancelled.wait(LIMIT_S)


def test_serve_passes_its_options_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}
    server = types.ModuleType("camserve_server.__main__")
    monkeypatch.setattr(server, "serve", lambda **options: arguments.update(options) or 3, raising=False)
    monkeypatch.setitem(sys.modules, "camserve_server.__main__", server)
    assert run("serve").exit_code == 3
    assert arguments == {"config": None, "listen": None, "device": None, "insecure": None}
    run("serve", "--config", "camserve.toml", "--listen", "127.0.0.1:0", "--device", "cpu", "--insecure")
    assert arguments == {"config": Path("camserve.toml"), "listen": "127.0.0.1:0", "device": "cpu", "insecure": True}


def test_public_names_are_exported_and_sorted() -> None:
    assert camserve.__all__ == sorted(camserve.__all__)
    assert all(hasattr(camserve, name) for name in camserve.__all__)
    public = {name for name, value in vars(camserve).items() if isinstance(value, type)}
    assert public <= set(camserve.__all__)
