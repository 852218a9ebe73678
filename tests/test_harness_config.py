"""From bakeoff's config.yaml, a dataset and model descriptors to the runs of an enqueue request."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.documents import load_schema
from cli.descriptors import Undescribed, describe, read_folder
from cli.documents import read_document
from cli.harness_config import read_runs
from cli.output import CommandFailed

CATALOGUE = Path(__file__).parent.parent / "sandbox" / "catalogue"
BATCH = "3f1a7ad2-9f0e-4b0a-8a52-0d6ad8a3c001"
MODEL = {"id": "m-q4_0", "alias": "M", "gguf": "/mnt/w/M-Q4_0.gguf", "ctx": 4096, "num_params": 7.6}
TASK = {"id": "t", "domain": "d", "user_prompt": "?", "expected": 4, "scorer": "exact"}
FLOOR = TASK | {"id": "f", "tier": "dumb_model"}
CONFIG = {
    "run": {"name": "grid", "seed": 1},
    "queue": {"lease_ttl_s": 300},
    "dataset": {"tasks": [TASK]},
    "models": [MODEL],
    "prompts": [{"id": "p", "system": "Be brief."}],
}
DESCRIPTOR = {
    "name": "M",
    "parameter_count_b": 8,
    "architecture": "Dense",
    "quantization": "q8_0",
    "file_format": "GGUF",
}


def convert(folder: Path, descriptors: Path | None = None, **changes: Any) -> list[dict[str, Any]]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return read_runs(path, descriptors, BATCH)


def refused(folder: Path, descriptors: Path | None = None, **changes: Any) -> CommandFailed:
    with pytest.raises(CommandFailed) as failure:
        convert(folder, descriptors, **changes)
    return failure.value


def write(folder: Path, name: str, text: Any) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_a_config_is_one_run_per_model_each_with_its_own_config(tmp_path: Path) -> None:
    other = MODEL | {"id": "other", "gguf": "Other.IQ4_XS.gguf"}
    runs = convert(tmp_path, models=[MODEL, other])
    assert [run["config"]["models"] for run in runs] == [[MODEL], [other]]
    assert [run["model"]["quantization"] for run in runs] == ["q4_0", "iq4_xs"]
    assert {run["batch_id"] for run in runs} == {BATCH}
    assert runs[0]["prompts"] == CONFIG["prompts"]
    assert runs[0]["config"]["run"] == {"name": "grid", "seed": 1}


def test_the_services_own_settings_are_left_out_of_the_job(tmp_path: Path) -> None:
    [run] = convert(tmp_path)
    assert "queue" not in run["config"]


def test_a_model_is_described_from_the_config(tmp_path: Path) -> None:
    [run] = convert(tmp_path)
    assert run["model"] == {
        "name": "m-q4_0",
        "parameter_count_b": 7.6,
        "architecture": "Dense",
        "quantization": "q4_0",
        "file_format": "GGUF",
        "sources": [{"source_type": "local_file", "url": "M-Q4_0.gguf"}],
        "context_length_default": 4096,
    }


@pytest.mark.parametrize(
    ("num_params", "billions"),
    [(0.5, 0.5), (7, 7.0), (100_000, 100_000.0), (100_001, 0.000100001), (7_620_000_000, 7.62)],
)
def test_up_to_100000_num_params_counts_billions(num_params: float, billions: float) -> None:
    assert describe(MODEL | {"num_params": num_params}, [])["parameter_count_b"] == billions


@pytest.mark.parametrize(("active", "architecture"), [(1.9, "MoE"), (7.6, "Dense")])
def test_fewer_active_parameters_make_a_mixture_of_experts(
    active: float, architecture: str
) -> None:
    described = describe(MODEL | {"num_active_params": active}, [])
    assert described["architecture"] == architecture
    assert described["active_parameter_count_b"] == active


@pytest.mark.parametrize("active", [0, -1, 7.7, "2", True])
def test_impossible_active_parameters_are_refused(active: Any) -> None:
    with pytest.raises(Undescribed, match="num_active_params"):
        describe(MODEL | {"num_active_params": active}, [])


@pytest.mark.parametrize("count", [None, 0, -7, "7B", True])
def test_an_unusable_parameter_count_is_refused(count: Any) -> None:
    with pytest.raises(Undescribed, match="parameter count"):
        describe(MODEL | {"num_params": count}, [])


@pytest.mark.parametrize(
    ("gguf", "quantization"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "q4_k_m"),
        ("model.IQ3_XXS.gguf", "iq3_xxs"),
        ("model_q8_0.gguf", "q8_0"),
        ("big-BF16-00001-of-00003.gguf", "bf16"),
        ("Q5_0/model-Q6_K.gguf", "q6_k"),
        (r"C:\weights\q5_0\model-Q6_K.gguf", "q6_k"),
    ],
)
def test_a_quantization_is_read_from_the_file_name(gguf: str, quantization: str) -> None:
    assert describe(MODEL | {"gguf": gguf}, [])["quantization"] == quantization


@pytest.mark.parametrize(
    "gguf",
    [
        "m.gguf",
        "m-Q4_0-Q8_0.gguf",
        "m-Q4_0_4_4.gguf",
        "m-Q2_K_XL.gguf",
        "m-XQ4_0.gguf",
        "m-F16.gguf",
    ],
)
def test_a_file_name_without_exactly_one_known_quantization_is_no_guess(gguf: str) -> None:
    with pytest.raises(Undescribed, match="does not name exactly one known quantization"):
        describe(MODEL | {"gguf": gguf}, [])


@pytest.mark.parametrize(
    ("file", "name"), [("m-q4_0.json", "anything"), ("x.json", "m-q4_0"), ("x.json", "M")]
)
def test_a_descriptor_is_found_by_file_name_id_or_alias(
    tmp_path: Path, file: str, name: str
) -> None:
    write(tmp_path / "models", file, DESCRIPTOR | {"name": name, "version": "1"})
    [run] = convert(tmp_path, tmp_path / "models")
    assert run["model"] == DESCRIPTOR | {"name": name, "version": "1"}


def test_the_descriptor_named_after_the_id_wins(tmp_path: Path) -> None:
    write(tmp_path, "a.json", DESCRIPTOR)
    write(tmp_path, "m-q4_0.json", DESCRIPTOR | {"quantization": "q4_0"})
    assert describe(MODEL, read_folder(tmp_path))["quantization"] == "q4_0"


def test_two_descriptors_of_one_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.json", DESCRIPTOR)
    write(tmp_path, "b.json", DESCRIPTOR)
    with pytest.raises(Undescribed, match=r"a\.json, .*b\.json"):
        describe(MODEL, read_folder(tmp_path))


def test_an_alias_that_is_missing_matches_no_descriptor(tmp_path: Path) -> None:
    write(tmp_path, "nameless.json", {"quantization": "q8_0"})
    model = {name: value for name, value in MODEL.items() if name != "alias"}
    assert describe(model, read_folder(tmp_path))["quantization"] == "q4_0"


def test_a_descriptor_without_a_parameter_count_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "m-q4_0.json", {"name": "M", "architecture": "Dense"})
    with pytest.raises(Undescribed, match=r"m-q4_0\.json lacks parameter_count_b, quantization"):
        describe(MODEL, read_folder(tmp_path))


def test_a_descriptor_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "bad.json", [])
    with pytest.raises(CommandFailed, match=r"bad\.json: a model descriptor is a JSON object"):
        read_folder(tmp_path)


def test_all_bad_models_are_named_at_once(tmp_path: Path) -> None:
    models = [
        {"id": "bare"},
        MODEL,
        {"gguf": "x-Q4_0.gguf", "num_params": 1},
        MODEL | {"id": "f16", "gguf": "m-F16.gguf"},
        MODEL,
        "text",
    ]
    failure = refused(tmp_path, models=models)
    assert "config.yaml: 5 of 6 models cannot be enqueued" in failure.line
    assert [detail.split(":")[0] for detail in failure.details] == [
        "models[0] (bare)",
        "models[0] (bare)",
        "models[2]",
        "models[3] (f16)",
        "models[4]",
        "models[5]",
    ]
    assert "bare.json into the --models folder" in failure.details[0]


@pytest.mark.parametrize("section", ["models", "prompts", "dataset"])
@pytest.mark.parametrize("empty", [None, []])
def test_a_missing_section_is_named(tmp_path: Path, section: str, empty: Any) -> None:
    failure = refused(tmp_path, None, **{section: empty})
    assert f"config.yaml: {section} missing or empty" in failure.line


@pytest.mark.parametrize("section", ["models", "prompts"])
def test_a_section_that_is_no_list_is_refused(tmp_path: Path, section: str) -> None:
    failure = refused(tmp_path, None, **{section: {"id": "x"}})
    assert f"`{section}` must be a list" in failure.line


@pytest.mark.parametrize("document", ["", "just text", "3", "runs: 3", "runs: []", "[]", "[3]"])
def test_a_file_that_is_neither_form_is_refused(tmp_path: Path, document: str) -> None:
    with pytest.raises(CommandFailed, match=r"file\.yaml: "):
        read_runs(write(tmp_path, "file.yaml", document), None, BATCH)


@pytest.mark.parametrize("prompt", [{"id": 1, "system": "x"}, {"id": "x"}, "x"])
def test_a_prompt_needs_text(tmp_path: Path, prompt: Any) -> None:
    failure = refused(tmp_path, None, prompts=[{"id": "ok", "system": ""}, prompt])
    assert "prompts[1]." in failure.line


def test_tasks_of_the_floor_tier_are_told_apart(tmp_path: Path) -> None:
    [run] = convert(tmp_path, dataset={"tasks": [TASK, FLOOR], "floor_tasks": [TASK | {"id": "g"}]})
    assert [task["id"] for task in run["tasks"]] == ["t"]
    assert [task["id"] for task in run["floor_tasks"]] == ["f", "g"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/tasks.yaml", yaml.safe_dump({"tasks": [TASK], "floor_tasks": [FLOOR]})),
        ("data/tasks.yaml", yaml.safe_dump([TASK, FLOOR])),
        ("data/tasks.json", json.dumps([FLOOR, TASK])),
        ("data/tasks.jsonl", f"{json.dumps(TASK)}\n\n{json.dumps(FLOOR)}\n"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda name: name, lambda name: {"path": name, "split": "x"}])
def test_a_dataset_file_is_found_beside_the_config(
    tmp_path: Path, name: str, text: str, wrap: Any
) -> None:
    write(tmp_path, name, text)
    [run] = convert(tmp_path, dataset=wrap(name))
    assert (run["tasks"], run["floor_tasks"]) == ([TASK], [FLOOR])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere.yaml", r"nowhere\.yaml: cannot be read"),
        ({"split": "x"}, "has no tasks"),
        ({"tasks": []}, "has no tasks"),
        ({"tasks": {"id": "t"}}, "`tasks` must be a list"),
        ({"tasks": [TASK], "floor_tasks": "x"}, "`floor_tasks` must be a list"),
        ({"tasks": [TASK, {"id": 7}]}, r"tasks\[1\]\.id must be text"),
        ({"tasks": [FLOOR]}, "needs one of tier main"),
    ],
)
def test_a_bad_dataset_is_named(tmp_path: Path, dataset: Any, message: str) -> None:
    with pytest.raises(CommandFailed, match=message):
        convert(tmp_path, dataset=dataset)


@pytest.mark.parametrize(
    "document", [{"runs": [{"model": {}}]}, [{"model": {}}], {"model": {}, "tasks": []}]
)
def test_the_admin_apis_json_passes_as_it_is(tmp_path: Path, document: Any) -> None:
    [run] = read_runs(write(tmp_path, "runs.json", document), None, BATCH)
    assert run["model"] == {}
    assert "batch_id" not in run


def test_what_stands_beside_runs_is_not_dropped_silently(tmp_path: Path) -> None:
    path = write(tmp_path, "runs.json", {"runs": [{}], "priority": 1})
    with pytest.raises(CommandFailed, match="remove priority"):
        read_runs(path, None, BATCH)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x:\n  b: 1\n  c: 2\n  b: 3\n", r"a\.yaml, line 4: the key b appears twice"),
        ("a.yaml", "x: 1\non: 2\n", r"a\.yaml, line 2: the key on is not text"),
        ("a.yaml", "x: 1\n7: 2\n", r"a\.yaml, line 2: the key 7 is not text"),
        ("a.yaml", "x: 1\n? [a]\n: 2\n", r"a\.yaml, line 2: the key .* is not text"),
        ("a.yaml", "x: 1\ny: [\n", r"a\.yaml, line 3: "),
        ("a.yaml", "x: !!python/name:os.system\n", r"a\.yaml, line 1: could not determine"),
        ("a.yaml", "x: .nan\n", r"a\.yaml: holds what JSON cannot say"),
        ("a.yaml", "x: &a [*a]\n", r"a\.yaml: holds what JSON cannot say"),
        ("a.yaml", "x: !!set {a}\n", r"a\.yaml: holds what JSON cannot say"),
        ("a.yaml", "[" * 5000, r"a\.yaml: nested too deeply"),
        ("a.yaml", "x: '\x01'", r"a\.yaml: .*special characters"),
        ("a.json", '{"x": 1, "x": 2}', r'a\.json: .*"x" twice'),
        ("a.json", "{", r"a\.json: Not JSON at line 1"),
        ("a.jsonl", '{}\n{"x": NaN}\n', r"a\.jsonl, line 2: "),
    ],
)
def test_a_file_that_two_readers_would_read_differently_is_refused_by_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(CommandFailed, match=message):
        read_document(write(tmp_path, name, text))


def test_yaml_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"x: \xff\n")
    with pytest.raises(CommandFailed, match="not UTF-8 at byte 3"):
        read_document(path)


def test_a_date_in_yaml_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "released: 2024-07-23\n")
    assert read_document(path) == {"released": "2024-07-23"}


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    text = "base: &b {a: 1, c: 2}\nmine:\n  <<: *b\n  a: 3\n"
    assert read_document(write(tmp_path, "a.yaml", text))["mine"] == {"a": 3, "c": 2}


def test_what_is_worked_out_from_a_config_fits_the_services_schema(tmp_path: Path) -> None:
    model = MODEL | {"num_active_params": 1.9}
    runs = convert(tmp_path, models=[model], dataset=[TASK, FLOOR])
    assert load_schema("enqueue").violations({"runs": runs}) == ()


def test_the_demos_catalogue_converts() -> None:
    config = yaml.safe_load((CATALOGUE / "config.yaml").read_text())
    runs = read_runs(CATALOGUE / "config.yaml", CATALOGUE / "models", BATCH)
    assert [run["config"]["models"] for run in runs] == [[model] for model in config["models"]]
    for run in runs:
        model = run["config"]["models"][0]
        descriptor = json.loads((CATALOGUE / "models" / f"{model['id']}.json").read_text())
        assert run["model"] == descriptor
        assert run["tasks"]
        assert run["floor_tasks"]
        assert run["prompts"] == config["prompts"]
    assert load_schema("enqueue").violations({"runs": runs}) == ()
