"""From bakeoff's config.yaml, a dataset and model descriptors to the runs of an enqueue request."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.documents.schemas import load_schema
from broker.jobs.quantizations import KNOWN, find, in_file_name
from cli.receipts import read_object
from client.descriptors import Undescribed, describe, read_folder
from client.documents import TEXT_MEMBERS, read_document
from client.harness_config import Beside, JudgeMode, read_runs
from client.output import CommandFailed
from sandbox.services.stack import CATALOGUE, CATALOGUE_FILES

BATCH = "3f1a7ad2-9f0e-4b0a-8a52-0d6ad8a3c001"
MODEL = {"id": "m-q4_0", "alias": "M", "gguf": "o/r/M-Q4_0.gguf", "ctx": 4096, "num_params": 7.6}
TASK = {"id": "t", "domain": "qa", "user_prompt": "?", "expected": "4", "scorer": "exact"}
FLOOR = TASK | {"id": "f", "tier": "dumb_model"}
CONFIG = {
    "run": {"name": "grid", "seed": 1},
    "queue": {"lease_ttl_s": 300},
    "dataset": {"n": 1, "domains": ["qa", "code"]},
    "models": [MODEL],
    "prompts": [{"id": "p", "system": "Be brief."}],
}
DESCRIPTOR = {
    "name": "M",
    "parameter_count_b": 8,
    "architecture": "Dense",
    "quantization": "q4_0",
    "file_format": "GGUF",
}
ALONE = Beside()


def convert(
    folder: Path,
    descriptors: Path | None = None,
    *,
    tasks: Any = (TASK,),
    floor_tasks: Any = (FLOOR,),
    judge_mode: JudgeMode | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Convert CONFIG with changes; tasks are written as JSON Lines, and None gives no file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    files = [
        None if listed is None else write(folder, name, "\n".join(map(json.dumps, listed)))
        for name, listed in (("tasks.jsonl", tasks), ("floor.jsonl", floor_tasks))
    ]
    return read_runs(path, Beside(files[0], files[1], descriptors, judge_mode), BATCH)


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
    assert runs[0]["config"]["dataset"] == CONFIG["dataset"], "the harness makes its tasks of it"
    assert (runs[0]["tasks"], runs[0]["floor_tasks"]) == ([TASK], [FLOOR])


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
    assert describe(MODEL | {"num_params": num_params}, [], KNOWN)["parameter_count_b"] == billions


@pytest.mark.parametrize(("active", "architecture"), [(1.9, "MoE"), (7.6, "Dense")])
def test_fewer_active_parameters_make_a_mixture_of_experts(
    active: float, architecture: str
) -> None:
    described = describe(MODEL | {"num_active_params": active}, [], KNOWN)
    assert described["architecture"] == architecture
    assert described["active_parameter_count_b"] == active


@pytest.mark.parametrize("active", [0, -1, 7.7, "2", True])
def test_impossible_active_parameters_are_refused(active: Any) -> None:
    with pytest.raises(Undescribed, match="num_active_params"):
        describe(MODEL | {"num_active_params": active}, [], KNOWN)


@pytest.mark.parametrize("count", [None, 0, -7, "7B", True])
def test_an_unusable_parameter_count_is_refused(count: Any) -> None:
    with pytest.raises(Undescribed, match="parameter count"):
        describe(MODEL | {"num_params": count}, [], KNOWN)


@pytest.mark.parametrize(
    ("gguf", "quantization"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "q4_k_m"),
        ("model.IQ3_XXS.gguf", "iq3_xxs"),
        ("model_q8_0.gguf", "q8_0"),
        ("big-BF16-00001-of-00003.gguf", "bf16"),
        ("Q5_0/model-Q6_K.gguf", "q6_k"),
        (r"C:\weights\q5_0\model-Q6_K.gguf", "q6_k"),
        ("m-F16.gguf", "fp16"),
        ("m.f32.gguf", "fp32"),
    ],
)
def test_a_quantization_is_read_from_the_file_name(gguf: str, quantization: str) -> None:
    assert describe(MODEL | {"gguf": gguf}, [], KNOWN)["quantization"] == quantization


@pytest.mark.parametrize(
    "gguf",
    [
        "m.gguf",
        "m-Q4_0-Q8_0.gguf",
        "m-XQ4_0.gguf",
    ],
)
def test_a_file_name_without_exactly_one_quantization_is_no_guess(gguf: str) -> None:
    with pytest.raises(Undescribed, match="rename it so that it names one, or put a descriptor"):
        describe(MODEL | {"gguf": gguf}, [], KNOWN)


@pytest.mark.parametrize(
    ("gguf", "name"),
    [
        ("o/r/Qwen3-8B-UD-Q4_K_XL.gguf", "ud_q4_k_xl"),
        ("o/r/gpt-oss-20b-MXFP4.gguf", "mxfp4"),
        ("o/r/gpt-oss-20b-MXFP4_MOE.gguf", "mxfp4_moe"),
        ("o/r/m-Q4_0_4_4.gguf", "q4_0_4_4"),
        ("o/r/m-Q2_K_XL.gguf", "q2_k_xl"),
        ("o/r/m-TQ1_0.gguf", "tq1_0"),
        ("o/r/m-Q6_K_L.gguf", "q6_k_l"),
        ("o/r/m-Q4_K.gguf", "q4_k"),
    ],
)
def test_a_quantization_without_a_vram_need_is_refused_with_the_list(gguf: str, name: str) -> None:
    with pytest.raises(Undescribed) as problem:
        describe(MODEL | {"gguf": gguf}, [], KNOWN)
    [said] = problem.value.problems
    assert f"is in {name}, of which bakeoff's table has no VRAM need: put a descriptor" in said
    assert "m-q4_0.json into the --models folder that names the nearest" in said
    assert said.endswith("known: " + ", ".join(KNOWN))


def test_a_descriptor_may_name_the_nearest_quantization(tmp_path: Path) -> None:
    write(tmp_path, "m-q4_0.json", DESCRIPTOR | {"quantization": "q4_k_m"})
    model = MODEL | {"gguf": "o/r/M-UD-Q4_K_XL.gguf"}
    assert describe(model, read_folder(tmp_path), KNOWN)["quantization"] == "q4_k_m"


def test_a_descriptor_of_another_quantization_than_the_file_is_refused(tmp_path: Path) -> None:
    """Two quantizations of one model often share their alias."""
    write(tmp_path, "a.json", DESCRIPTOR | {"quantization": "Q8_0"})
    with pytest.raises(Undescribed, match="says q8_0, and its gguf q4_0"):
        describe(MODEL, read_folder(tmp_path), KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_every_name_of_bakeoffs_table_is_recognised_in_any_spelling(name: str) -> None:
    for spelled in (name, name.upper(), name.upper().replace("FP", "F")):
        assert in_file_name(f"Model-7B-{spelled}.gguf") == [name]
        assert in_file_name(f"model.i1-{spelled}-00001-of-00003.gguf") == [name]
        assert find(spelled, KNOWN) == name
    assert find("UD-Q4_K_XL", KNOWN) is None


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("DeepSeek-R1-0528-Qwen3-8B.gguf", []),
        ("phi-4-q8.gguf", []),
        ("m-Q4_K_M_imatrix.gguf", ["q4_k_m"]),
        ("Q4_K_M-of-m-q4_k_m.gguf", ["q4_k_m"]),
        ("m-F16.fp16.gguf", ["fp16"]),
        ("m-UD-Q4_K_XL.gguf", ["ud_q4_k_xl"]),
        ("m.UD_IQ1_S-00001-of-00003.gguf", ["ud_iq1_s"]),
        ("m-F16-Q4_0.gguf", ["fp16", "q4_0"]),
    ],
)
def test_a_file_name_tells_each_quantization_once_and_whole(file: str, names: list[str]) -> None:
    assert in_file_name(file) == names


def test_a_name_that_a_database_has_of_its_own_is_itself() -> None:
    assert find("Q4_CUSTOM", ["Q4_CUSTOM"]) == "Q4_CUSTOM"


@pytest.mark.parametrize(
    ("file", "name"), [("m-q4_0.json", "anything"), ("x.json", "m-q4_0"), ("x.json", "M")]
)
def test_a_descriptor_is_found_by_file_name_id_or_alias(
    tmp_path: Path, file: str, name: str
) -> None:
    write(tmp_path / "models", file, DESCRIPTOR | {"name": name, "version": "1"})
    [run] = convert(tmp_path, tmp_path / "models")
    assert run["model"] == DESCRIPTOR | {"name": name, "version": "1"}


@pytest.mark.parametrize(
    "source",
    [
        {"source_type": "local_file", "url": "M-Q4_0.gguf"},
        {"source_type": "direct_url", "url": "https://x.example/files/M-Q4_0.gguf"},
        {"source_type": "huggingface", "url": "https://huggingface.co/o/r"},
        {"source_type": "huggingface", "url": "https://huggingface.co/o/r/"},
        {"source_type": "huggingface", "url": "-", "source_metadata": {"hf_repo": "o/r"}},
    ],
)
def test_a_descriptor_of_the_store_is_found_by_its_weights(
    tmp_path: Path, source: dict[str, Any]
) -> None:
    """The store names its files by ids that nobody writes into a config."""
    of = DESCRIPTOR | {"name": "Some Name", "sources": [source], "model_hash": None}
    write(tmp_path, "5d2d89c1-2e92-51f6-8a4a-3e5023195289.json", of)
    assert describe(MODEL, read_folder(tmp_path), KNOWN) == of
    write(tmp_path, "a.json", of | {"quantization": "q8_0", "sources": [
        {"source_type": "huggingface", "url": "https://huggingface.co/o/r"}]})  # fmt: skip
    assert describe(MODEL, read_folder(tmp_path), KNOWN) == of, (
        "the repository's other quantization"
    )


@pytest.mark.parametrize(
    "source",
    [
        {"url": "https://huggingface.co/o/another"},
        {"url": "https://huggingface.co/o/r", "instead": {"quantization": "q8_0"}},
        {"url": "https://x.example/files/Another-M-Q4_0.gguf"},
        {"url": "-", "source_metadata": {"hf_repo": "o/another"}},
        {"url": "-", "source_metadata": None},
    ],
)
def test_a_descriptor_of_other_weights_is_not_taken(tmp_path: Path, source: dict[str, Any]) -> None:
    other = {"name": "Some Name", "quantization": "q4_0", "sources": [source]}
    write(tmp_path, "5d2d89c1.json", DESCRIPTOR | other | source.get("instead", {}))
    assert describe(MODEL, read_folder(tmp_path), KNOWN)["name"] == "m-q4_0"


def test_a_file_without_folders_is_found_by_its_url_too(tmp_path: Path) -> None:
    of = {"name": "Some Name", "sources": [{"source_type": "local_file", "url": "M-Q4_0.gguf"}]}
    write(tmp_path, "5d2d89c1.json", DESCRIPTOR | of)
    model = MODEL | {"gguf": "M-Q4_0.gguf"}
    assert describe(model, read_folder(tmp_path), KNOWN)["name"] == "Some Name"


def test_a_descriptor_of_the_store_is_found_by_the_files_name(tmp_path: Path) -> None:
    write(tmp_path, "5d2d89c1.json", DESCRIPTOR | {"name": "M-Q4_0"})
    assert describe(MODEL | {"alias": "x"}, read_folder(tmp_path), KNOWN)["name"] == "M-Q4_0"


def test_the_descriptor_named_after_the_id_wins(tmp_path: Path) -> None:
    write(tmp_path, "a.json", DESCRIPTOR)
    write(tmp_path, "m-q4_0.json", DESCRIPTOR | {"version": "2"})
    assert describe(MODEL, read_folder(tmp_path), KNOWN)["version"] == "2"


def test_two_descriptors_of_one_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.json", DESCRIPTOR)
    write(tmp_path, "b.json", DESCRIPTOR)
    with pytest.raises(Undescribed, match=r"a\.json, .*b\.json"):
        describe(MODEL, read_folder(tmp_path), KNOWN)


def test_an_alias_that_is_missing_matches_no_descriptor(tmp_path: Path) -> None:
    write(tmp_path, "nameless.json", {"quantization": "q8_0"})
    model = {name: value for name, value in MODEL.items() if name != "alias"}
    assert describe(model, read_folder(tmp_path), KNOWN)["quantization"] == "q4_0"


@pytest.mark.parametrize("alias", [["M"], {"of": "M"}, 7])
def test_an_alias_that_is_not_text_matches_no_descriptor(tmp_path: Path, alias: Any) -> None:
    write(tmp_path, "a.json", DESCRIPTOR | {"name": alias})
    assert describe(MODEL | {"alias": alias}, read_folder(tmp_path), KNOWN)["name"] == "m-q4_0"


def test_a_descriptor_without_a_parameter_count_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "m-q4_0.json", {"name": "M", "architecture": "Dense"})
    with pytest.raises(Undescribed, match=r"m-q4_0\.json lacks parameter_count_b, quantization"):
        describe(MODEL, read_folder(tmp_path), KNOWN)


def test_a_descriptor_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "bad.json", [])
    with pytest.raises(CommandFailed, match=r"bad\.json: a model descriptor is a JSON object"):
        read_folder(tmp_path)


def test_all_bad_models_are_named_at_once(tmp_path: Path) -> None:
    models = [
        {"id": "bare"},
        MODEL,
        {"gguf": "x-Q4_0.gguf", "num_params": 1},
        MODEL | {"id": "mx", "gguf": "m-MXFP4.gguf"},
        MODEL,
        "text",
    ]
    failure = refused(tmp_path, models=models)
    assert "config.yaml: 5 of 6 models cannot be enqueued" in failure.line
    assert [detail.split(":")[0] for detail in failure.details] == [
        "models[0] (bare)",
        "models[0] (bare)",
        "models[2]",
        "models[3] (mx)",
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
        read_runs(write(tmp_path, "file.yaml", document), ALONE, BATCH)


@pytest.mark.parametrize("prompt", [{"id": 1, "system": "x"}, {"id": "x"}, "x"])
def test_a_prompt_needs_text(tmp_path: Path, prompt: Any) -> None:
    failure = refused(tmp_path, None, prompts=[{"id": "ok", "system": ""}, prompt])
    assert "must be text" in failure.line


# The tasks


def test_a_tasks_line_loses_what_the_harness_does_not_read(tmp_path: Path) -> None:
    [run] = convert(tmp_path, tasks=[TASK | {"note": "x"}], floor_tasks=[FLOOR | {"why": 1}])
    assert (run["tasks"], run["floor_tasks"]) == ([TASK], [FLOOR])


@pytest.mark.parametrize("name", ["tasks.yaml", "tasks.json"])
def test_tasks_may_be_a_list_as_well(tmp_path: Path, name: str) -> None:
    config = write(tmp_path, "config.yaml", yaml.safe_dump(CONFIG))
    beside = Beside(write(tmp_path, name, [TASK]), write(tmp_path, "f.json", [FLOOR]))
    [run] = read_runs(config, beside, BATCH)
    assert run["tasks"] == [TASK]


@pytest.mark.parametrize(
    "dataset",
    [
        {"tasks": [TASK]}, "tasks.yaml", [TASK], {"n": 1}, {"domains": ["qa"]},
        {"n": 0, "domains": ["qa"]}, {"n": True, "domains": ["qa"]}, {"n": 1.0, "domains": ["qa"]},
        {"n": 1, "domains": []}, {"n": 1, "domains": "qa"}, {"n": 1, "domains": ["qa", "poetry"]},
    ],
)  # fmt: skip
def test_a_dataset_that_the_harness_cannot_read_is_refused(tmp_path: Path, dataset: Any) -> None:
    failure = refused(tmp_path, dataset=dataset)
    assert "the harness reads `dataset` as n (a whole number) and domains (of qa, code" in str(
        failure
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": None}, r"the harness makes 1 tasks .* give --tasks FILE, which .* --dry-run"),
        ({"floor_tasks": None}, r"always runs its floor tasks: give --floor-tasks FILE"),
        ({"floor_tasks": None, "dumb_model_tier": {}}, r"always runs its floor tasks"),
        ({"tasks": [TASK, TASK | {"id": "u"}]}, r"has 2 tasks, and .* asks for n = 1"),
        ({"tasks": [TASK | {"domain": "classify"}]}, r"tasks\[0\]\.domain is not of"),
        ({"tasks": [FLOOR]}, r"tasks\[0\] is of tier dumb_model, not of main"),
        ({"floor_tasks": [TASK | {"tier": "main"}]}, r"tasks\[0\] is of tier main, not of dumb"),
        ({"tasks": [{"id": 7}]}, r"tasks\[0\]\.id must be text"),
        ({"tasks": []}, "must list tasks"),
        ({"dumb_model_tier": {"enabled": False}}, "switches the floor tasks off: leave --floor"),
    ],
)
def test_tasks_that_are_not_those_of_the_config_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommandFailed, match=message):
        convert(tmp_path, **given)


def test_floor_tasks_may_be_switched_off(tmp_path: Path) -> None:
    [run] = convert(tmp_path, floor_tasks=None, dumb_model_tier={"enabled": False})
    assert "floor_tasks" not in run


# The judge

JUDGE = {"enabled": True, "mode": "scored", "gguf": "o/j/Judge-Q8_0.gguf", "num_params": 20}


def test_the_judge_is_described_like_a_model(tmp_path: Path) -> None:
    [run] = convert(tmp_path, judge=JUDGE)
    assert (run["judge"]["name"], run["judge"]["quantization"]) == ("Judge-Q8_0", "q8_0")
    assert run["judge"]["parameter_count_b"] == 20
    write(
        tmp_path / "models", "x.json", DESCRIPTOR | {"name": "Judge-Q8_0", "quantization": "q8_0"}
    )
    undersized = {name: value for name, value in JUDGE.items() if name != "num_params"}
    [run] = convert(tmp_path, tmp_path / "models", judge=undersized)
    assert run["judge"]["parameter_count_b"] == 8


def test_a_judge_that_is_one_of_the_models_is_described_once(tmp_path: Path) -> None:
    other = MODEL | {"id": "other", "gguf": "o/j/Judge-Q8_0.gguf", "num_params": 20}
    runs = convert(tmp_path, models=[MODEL, other], judge=JUDGE | {"num_params": None})
    assert [run["judge"] for run in runs] == [runs[1]["model"]] * 2


def test_a_judge_that_cannot_be_described_is_refused_as_it_needs_memory(tmp_path: Path) -> None:
    failure = refused(tmp_path, judge=JUDGE | {"num_params": None})
    assert "the judge needs VRAM as well (the larger of both counts)" in failure.line
    assert failure.details[0].startswith("judge: no usable parameter count: set num_params")
    assert "Judge-Q8_0.json into the --models folder" in failure.details[0]


def test_a_judge_without_a_file_is_no_model_without_a_file(tmp_path: Path) -> None:
    write(tmp_path / "models", "m-q4_0.json", DESCRIPTOR)
    bare = {name: value for name, value in MODEL.items() if name != "gguf"}
    judge = {"enabled": True, "mode": "scored", "num_params": 20}
    failure = refused(tmp_path, tmp_path / "models", models=[bare], judge=judge)
    assert "the judge needs VRAM as well" in failure.line
    [problem] = failure.details
    assert problem.startswith("judge: no gguf: set it to the weights' file name")
    assert problem.endswith("or put a descriptor judge.json into the --models folder")


def test_a_judge_that_is_switched_off_is_nobodys_need(tmp_path: Path) -> None:
    [run] = convert(tmp_path, judge={"enabled": False, "mode": "pairwise_all"})
    assert "judge" not in run


@pytest.mark.parametrize("judge", [JUDGE | {"mode": "pairwise_all"}, {"enabled": True}])
def test_a_judge_that_compares_models_is_refused_with_the_fix(tmp_path: Path, judge: Any) -> None:
    failure = refused(tmp_path, judge=judge)
    assert "judge.mode is pairwise_all" in failure.line
    assert "Set judge.mode to scored, or give --judge-mode scored (or off)" in failure.line


def test_the_judges_mode_may_be_given_beside_the_file(tmp_path: Path) -> None:
    pairwise = JUDGE | {"mode": "pairwise_all"}
    [scored] = convert(tmp_path, judge=pairwise, judge_mode=JudgeMode.SCORED)
    assert scored["config"]["judge"] == JUDGE
    assert "judge" in scored
    [off] = convert(tmp_path, judge=pairwise, judge_mode=JudgeMode.OFF)
    assert off["config"]["judge"] == pairwise | {"enabled": False}
    assert "judge" not in off
    assert "no judge is enabled" in refused(tmp_path, judge_mode=JudgeMode.SCORED).line


# bakeoff's own file, in its shape: two models without a parameter count, a judge that compares them

AB_CONFIG = """
# Matrix = models x prompt_variants x dataset
run:
  name: "ab-run-001"
  seed: 42
  timeout_s: 180
server:
  models_dir: "~/.lmstudio/models"
  image: "ghcr.io/ggml-org/llama.cpp:server-vulkan"
  ctx: 4096                   # small on purpose
  cache_type_k: "q8_0"
dataset:
  n: 2
  domains: [qa, code, summarize, classify]
models:
  - id: qwen_9b_q4
    alias: "qwen-9b-q4"
    gguf: "lmstudio-community/Qwen-9B-GGUF/Qwen-9B-Q4_K_M.gguf"
  - id: qwen_35b_a3b_q4
    alias: "qwen-35b-a3b-q4"
    gguf: "lmstudio-community/Qwen-35B-A3B-GGUF/Qwen-35B-A3B-Q4_K_M.gguf"
    ctx: 4096
prompts:
  - id: plain
    system: "You are a helpful assistant. Answer concisely."
judge:
  enabled: true
  mode: "pairwise_all"
  alias: "judge"
  gguf: "lmstudio-community/Qwen-35B-A3B-GGUF/Qwen-35B-A3B-Q4_K_M.gguf"
hardware: {id: "amd-8060s", peak_tflops: 39.0}
output: {dir: "results", emit_json: true}
"""
STORED = {
    "schema_version": 1,
    "creator": {"name": "qwen", "display_name": "Qwen Team", "homepage": None,
                "service_identifiers": {"huggingface": "Qwen"}, "provisional": False},
    "model_hash": None, "architecture": "Dense", "file_format": "GGUF", "quantization": "q4_k_m",
    "context_length_max": 131072, "model_source_size": None, "release_date": None,
    "provisional": True, "created_at": "2026-08-01T00:00:00Z", "updated_at": "2026-08-01T00:00:00Z",
}  # fmt: skip


def test_bakeoffs_own_config_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, total, active in (("Qwen-9B", 9.0, 9.0), ("Qwen-35B-A3B", 35.0, 3.0)):
        url = f"https://huggingface.co/lmstudio-community/{name}-GGUF"
        source = {"source_type": "huggingface", "url": url, "source_metadata": {"hf_pulls": 7}}
        write(tmp_path / "models", f"{name}-some-uuid.json", STORED | {
            "name": name, "parameter_count_b": total, "active_parameter_count_b": active,
            "sources": [source],
        })  # fmt: skip
    config = write(tmp_path, "config.yaml", AB_CONFIG)
    tasks = write(tmp_path, "tasks.json", [TASK, TASK | {"id": "t1", "domain": "code"}])
    floor = write(tmp_path, "floor.json", [FLOOR])
    beside = Beside(tasks, floor, tmp_path / "models", JudgeMode.SCORED)
    runs = read_runs(config, beside, BATCH)
    assert [run["model"]["name"] for run in runs] == ["Qwen-9B", "Qwen-35B-A3B"]
    assert {run["model"]["schema_version"] for run in runs} == {1}
    assert {run["judge"]["name"] for run in runs} == {"Qwen-35B-A3B"}
    assert runs[0]["config"]["dataset"] == {
        "n": 2,
        "domains": ["qa", "code", "summarize", "classify"],
    }
    assert load_schema("enqueue").violations({"runs": runs}) == ()
    with pytest.raises(CommandFailed, match="give --judge-mode scored"):
        read_runs(config, Beside(tasks, floor, tmp_path / "models"), BATCH)
    with pytest.raises(CommandFailed) as failure:
        read_runs(config, Beside(tasks, floor, None, JudgeMode.SCORED), BATCH)
    assert [said.partition(":")[0] for said in failure.value.details] == [
        "models[0] (qwen_9b_q4)",
        "models[1] (qwen_35b_a3b_q4)",
    ]
    assert all("set num_params" in said for said in failure.value.details)


# The admin API's form


@pytest.mark.parametrize(
    "document", [{"runs": [{"model": {}}]}, [{"model": {}}], {"model": {}, "tasks": []}]
)
def test_the_admin_apis_json_passes_as_it_is(tmp_path: Path, document: Any) -> None:
    [run] = read_runs(write(tmp_path, "runs.json", document), ALONE, BATCH)
    assert run["model"] == {}
    assert "batch_id" not in run


def test_what_stands_beside_runs_is_not_dropped_silently(tmp_path: Path) -> None:
    path = write(tmp_path, "runs.json", {"runs": [{}], "priority": 1})
    with pytest.raises(CommandFailed, match="remove priority"):
        read_runs(path, ALONE, BATCH)


@pytest.mark.parametrize(
    "beside",
    [
        Beside(tasks=Path("t")),
        Beside(floor_tasks=Path("f")),
        Beside(models=Path("m")),
        Beside(judge_mode=JudgeMode.OFF),
    ],
)
def test_what_belongs_to_a_config_is_refused_beside_runs(tmp_path: Path, beside: Beside) -> None:
    path = write(tmp_path, "runs.json", {"runs": [{"model": {}}]})
    with pytest.raises(CommandFailed, match="holds runs, not a config: give the file alone"):
        read_runs(path, beside, BATCH)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x:\n  b: 1\n  c: 2\n  b: 3\n", r"a\.yaml, line 4: the key b appears twice"),
        ("a.yaml", "x: 1\non: 2\n", r"a\.yaml, line 2: the key on is not text"),
        ("a.yaml", "x: 1\n7: 2\n", r"a\.yaml, line 2: the key 7 is not text"),
        ("a.yaml", "x: 1\n? [a]\n: 2\n", r"a\.yaml, line 2: the key .* is not text"),
        ("a.yaml", "x: 1\ny: [\n", r"a\.yaml, line 3: "),
        ("a.yaml", "x: !!python/name:os.system\n", r"a\.yaml, line 1: could not determine"),
        ("a.yaml", "x: .nan\n", r"a\.yaml, line 1: holds what JSON cannot say: \.nan"),
        ("a.yaml", "x: &a [*a]\n", r"a\.yaml: holds what JSON cannot say"),
        ("a.yaml", "x: !!set {a}\n", r"a\.yaml, line 1: holds what JSON cannot say"),
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


def test_json_that_two_readers_would_read_differently_is_told_by_pointer(tmp_path: Path) -> None:
    for read in (read_document, read_object):
        for text, place in (
            ('{"x": [NaN]}', "/x/0: is not"),
            ('{"x": {"a": 1, "a": 1}}', "/x/a: "),
        ):
            with pytest.raises(CommandFailed) as failure:
                read(write(tmp_path, "a.json", text))
            assert failure.value.details[0].startswith(place)
    with pytest.raises(CommandFailed) as failure:
        read_document(write(tmp_path, "a.jsonl", '{}\n{"y": Infinity}\n'))
    assert "a.jsonl, line 2: " in failure.value.line
    assert failure.value.details == ("/y: is not a JSON number",)


def test_yaml_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"x: \xff\n")
    with pytest.raises(CommandFailed, match="not UTF-8 at byte 3"):
        read_document(path)


def test_a_date_in_yaml_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "released: 2024-07-23\n")
    assert read_document(path) == {"released": "2024-07-23"}


# What YAML 1.1 makes something else of, one of each kind
TURNED = ("12:30", "12:30:45.5", "no", "Off", "yes", "3.10", "007", "0x1F", "0b1", "1_000", "4",
          "1.5e+3", ".nan", "NULL", "!!int 5", "!!bool maybe", "=")  # fmt: skip


@pytest.mark.parametrize("written", TURNED)
def test_text_that_yaml_reads_as_something_else_is_refused_with_its_line(
    tmp_path: Path, written: str
) -> None:
    path = write(tmp_path, "tasks.yaml", f"- id: a\n  expected: {written}\n")
    plain = written.rpartition(" ")[2]
    fix = re.escape(f"{plain} as ") + r"\w+" + re.escape(f': put it in quotes ("{plain}")')
    with pytest.raises(CommandFailed, match=rf"tasks\.yaml, line 2: expected .* reads {fix}"):
        read_document(path)
    for quoted in (f'"{plain}"', f"'{plain}'", f"!!str {plain}", f"|-\n    {plain}"):
        path = write(tmp_path, "tasks.yaml", f"- id: a\n  expected: {quoted}\n")
        assert read_document(path)[0]["expected"] == plain


@pytest.mark.parametrize("member", sorted(TEXT_MEMBERS))
def test_every_member_that_is_text_must_be_text(tmp_path: Path, member: str) -> None:
    for text in (
        f"a:\n  {member}: 12:30\n",
        f"a:\n  {member}: [x, 12:30]\n",
        f"a:\n  {member}: {{x: 12:30}}\n",
        f"base: &b\n  {member}: 12:30\nmine: {{<<: *b}}\n",
    ):
        with pytest.raises(CommandFailed, match=rf"line 2: {member} must be text"):
            read_document(write(tmp_path, "a.yaml", text))


def test_the_members_of_the_services_schema_and_of_the_real_config_are_known() -> None:
    """Each member that must be text by the enqueue's schema, but times and hashes of their own."""
    config = yaml.safe_load(AB_CONFIG)
    texts = {name for name, value in _members(config) if isinstance(value, str)}
    texts |= {
        name
        for name, kind in _members(load_schema("enqueue").definition)
        if isinstance(kind, dict) and "string" in (kind.get("type"), *_of(kind.get("type")))
    }
    times = {"not_before", "release_date", "model_source_mtime", "created_at", "updated_at"}
    assert texts - times - {"updated", "additionalProperties", "items"} <= TEXT_MEMBERS


def _of(kinds: Any) -> list[Any]:
    return kinds if isinstance(kinds, list) else []


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for child in value.values() if isinstance(value, dict) else _of(value):
        yield from _members(child)


@pytest.mark.parametrize("text", ["expected: null", "expected: ~", "expected:"])
def test_an_expectation_may_be_absent(tmp_path: Path, text: str) -> None:
    assert read_document(write(tmp_path, "a.yaml", text)) == {"expected": None}


def test_a_text_that_holds_itself_ends(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="JSON cannot say"):
        read_document(write(tmp_path, "a.yaml", "expected: &a [*a]"))


def test_what_is_no_text_means_what_the_harness_reads(tmp_path: Path) -> None:
    text = "timeout_s: 3:00\nflash_attn: on\nseed: 0x10\nn: 1_000\nkwh_rate_usd: 3.10\nm: 1e3\n"
    assert read_document(write(tmp_path, "a.yaml", text)) == yaml.safe_load(text)


@pytest.mark.parametrize("written", [".inf", "!!binary aGk=", "!!timestamp 2024-01-01", "0x_",
                                     "!!bool maybe", "!!set {a}", "9" * 5000])  # fmt: skip
def test_a_value_that_json_cannot_say_is_refused_with_its_line(tmp_path: Path, written) -> None:
    path = write(tmp_path, "a.yaml", f"a: 1\nb: {written}\n")
    with pytest.raises(CommandFailed, match=r"a\.yaml, line 2: holds what JSON cannot say: "):
        read_document(path)


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    text = "base: &b {a: 1, c: 2}\nmine:\n  <<: *b\n  a: 3\n"
    assert read_document(write(tmp_path, "a.yaml", text))["mine"] == {"a": 3, "c": 2}


def test_what_is_worked_out_from_a_config_fits_the_services_schema(tmp_path: Path) -> None:
    model = MODEL | {"num_active_params": 1.9}
    runs = convert(tmp_path, models=[model])
    assert load_schema("enqueue").violations({"runs": runs}) == ()


def test_the_demos_catalogue_converts() -> None:
    config = yaml.safe_load((CATALOGUE / "config.yaml").read_text())
    runs = read_runs(CATALOGUE / "config.yaml", CATALOGUE_FILES, BATCH)
    assert config["server"], "the harness refuses a config without"
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+\.gguf", m["gguf"]) for m in config["models"])
    assert [run["config"]["models"] for run in runs] == [[model] for model in config["models"]]
    for run in runs:
        model = run["config"]["models"][0]
        descriptor = json.loads((CATALOGUE / "models" / f"{model['id']}.json").read_text())
        assert run["model"] == descriptor
        assert run["tasks"]
        assert run["floor_tasks"]
        assert run["prompts"] == config["prompts"]
    assert load_schema("enqueue").violations({"runs": runs}) == ()
