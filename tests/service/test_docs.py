"""README.md, CONTRIBUTING.md and docs/ against the program: commands, settings, codes, bodies.

What a page shows can be typed or sent as it stands, and each name that it gives is one of the
program's.
"""

import ast
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from auth.signer_policy import load_policy
from broker.documents.schemas import load_schema
from cli.main import app
from client.output import ExitCode
from config.settings import CLIENT_VARIABLES, CONFIG_VARIABLE, PREFIX, Settings
from handlers.errors import STATUS, code_of
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.service.test_submit import lapse
from tests.support.fleet import code_of as code_of_answer
from tests.support.fleet import open_fleet
from tests.support.routes import IDS, PLACES, RUN

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in FILES}
# The pages that people act by. The decisions also tell of other programs.
TOLD = {name: text for name, text in PAGES.items() if "decisions" not in name}
COMMANDS: Any = get_command(app)
# Options of other programs that the pages name.
FOREIGN = {
    "cosign": {"--bundle", "--key", "--yes", "--new-bundle-format"},
    "pip": {"--require-hashes", "--no-deps"},
    "docker": {"--ulimit"},
    "bakeoff's harness": {"--config", "--output-dir", "--dry-run", "--resume-from", "--sign",
                          "--public-key"},
    "sandbox.runner.main": {"--help"},
}  # fmt: skip


def spans(text: str) -> Iterator[str]:
    """The inline code of a page, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for found in re.findall(r"`([^`]+)`", prose):
        yield " ".join(found.split())


def shell_lines(text: str) -> Iterator[str]:
    """The lines of a page's shell examples, without comments, continued ones joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.S | re.M):
        yield from block.replace("\\\n", " ").splitlines()


# Command lines


def command_lines(text: str) -> Iterator[str]:
    """What a page shows of our command line: whole lines, and names with or without arguments."""
    for line in shell_lines(text):
        if line.startswith("bakeoff-queue "):
            yield line.removeprefix("bakeoff-queue ")
    for span in spans(text):
        noun, _, rest = span.removeprefix("bakeoff-queue ").partition(" ")
        verb = rest.partition(" ")[0]
        named = span.startswith("bakeoff-queue ")
        if named or (hasattr(COMMANDS.commands.get(noun), "commands") and verb.isalpha()):
            yield span.removeprefix("bakeoff-queue ")


def wrong_in(line: str, *, whole: bool = False) -> list[str]:
    """What of a command line cannot be typed; `...` stands for whatever was left out.

    Of a bare name, arguments are only missed when it has to be a `whole` line.
    """
    words = [word for word in shlex.split(line, comments=True) if word != "[--yes]"]
    command, where = COMMANDS, []
    while words and hasattr(command, "commands"):
        word = words.pop(0)
        if word not in command.commands:
            return [f"{' '.join([*where, word])}: no such command"]
        command = command.commands[word]
        where.append(word)
    if hasattr(command, "commands"):
        return []
    options = {name: param for param in command.params for name in param.opts if name[0] == "-"}
    given, arguments, elided = set(), 0, not words and not whole
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            name, _, inline = word.partition("=")
            if name not in options:
                return [f"{' '.join(where)} has no option {name}"]
            given.add(options[name].name)
            if not (options[name].is_flag or inline) and (not words or words.pop(0)[:2] == "--"):
                return [f"{' '.join(where)} {name} has no value"]
        elif word == "...":
            elided = True
        else:
            arguments += 1
    missing = [] if elided else [
        param.opts[0] for param in command.params
        if param.required and param.param_type_name == "option" and param.name not in given
    ]  # fmt: skip
    positional = [param for param in command.params if param.param_type_name == "argument"]
    most = 10**6 if any(param.nargs == -1 for param in positional) else len(positional)
    least = 0 if elided else sum(param.required for param in positional)
    if not least <= arguments <= most:
        missing.append(f"{least} to {most} arguments, not {arguments}")
    return [f"{' '.join(where)} needs {what}" for what in missing]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_page_can_be_typed(page: str) -> None:
    assert [wrong for line in command_lines(PAGES[page]) for wrong in wrong_in(line)] == []


def test_a_command_line_that_cannot_be_typed_would_be_found() -> None:
    for line, wrong in {
        "tokens make": "tokens make: no such command",
        "runners drain ID --now": "runners drain has no option --now",
        "queue requeue RUN_ID": "queue requeue needs --reason",
        "runners drain": "runners drain needs 1 to 1 arguments, not 0",
        "tokens mint --name": "tokens mint --name has no value",
    }.items():
        assert wrong_in(line, whole=True) == [wrong]


SOURCES = [path for folder in ("cli", "config", "auth", "broker", "handlers", "db", "sandbox")
           for path in sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip


def messages(path: Path) -> Iterator[str]:
    """The texts of a module but its docstrings; what is filled in is `...`."""
    tree = ast.parse(path.read_text("utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            yield "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and id(node) not in told | parts:
            yield str(node.value)


def test_every_command_that_a_message_tells_to_type_can_be_typed() -> None:
    lines = {
        line: path.name
        for path in SOURCES
        for message in messages(path)
        for line in re.findall(r"`bakeoff-queue ([^`]+)`", message)
    }
    assert len(lines) > 5
    assert {n: w for n in lines if (w := wrong_in(n, whole=True))} == {}


def test_every_option_that_a_page_names_is_one() -> None:
    known = {name for command in commands(COMMANDS) for p in command.params for name in p.opts}
    known |= {f"--{name}" for name in ("help", "yes")} | {n for of in FOREIGN.values() for n in of}
    for page, text in TOLD.items():
        comments = (line.partition("# ")[2] for line in shell_lines(text))
        told = [*spans(text), *comments]
        named = {option for line in told for option in re.findall(r"(?<!\S)--[a-z-]+", line)}
        assert named <= known, page


def commands(command: Any) -> Iterator[Any]:
    """All commands below one."""
    for child in getattr(command, "commands", {}).values():
        yield from commands(child)
    yield command


def test_every_make_target_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page, text in PAGES.items():
        code = [*spans(text), *shell_lines(text)]
        named = {found[1] for line in code if (found := re.match(r"make ([a-z-]+)", line))}
        assert named <= targets, page


def test_the_exit_codes_are_all_in_the_table() -> None:
    section = PAGES["docs/operations.md"].partition("exit code says")[2].partition("\n## ")[0]
    assert sorted(map(int, re.findall(r"^\| (\d) \|", section, re.M))) == sorted(ExitCode)


# Settings, codes, pointers, names


def test_every_setting_that_a_page_names_is_there() -> None:
    fields = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known = fields | {f"{name}_FILE" for name in fields} | CLIENT_VARIABLES | {CONFIG_VARIABLE}
    for page, text in PAGES.items():
        named = set(re.findall(rf"\b{PREFIX}\w*[A-Z]\b", text))
        assert named <= known, page


def test_every_code_has_the_status_that_a_page_gives_it() -> None:
    status = {code_of(error.__new__(error)): status for error, status in STATUS.items()}
    found = 0
    for page, text in PAGES.items():
        flat = " ".join(text.split())
        pairs = [(code, number) for number, code in re.findall(r"\b([45]\d\d) `(\w+)`", flat)]
        pairs += re.findall(r"`(\w+)` (?:\| )?([45]\d\d)\b", flat)
        for code, number in pairs:
            if code in Settings.model_fields:  # of a limit: the status of what is beyond
                continue
            found += 1
            assert (code, status.get(code)) == (code, int(number)), page
    assert found > 40


ADDRESSES = re.compile(r"/(api|errors|healthz|readyz|metrics|\.well-known|proc|srv|64)\b")
DOCUMENTS = ("result", "manifest", "enqueue", "register", "runner_key")


def reaches(schema: Any, path: list[str], defs: dict[str, Any]) -> bool:
    """Whether a schema has a member at a pointer, or lets one stand there."""
    if not isinstance(schema, dict) or not path:
        return bool(schema)
    if "$ref" in schema:
        return reaches(defs[schema["$ref"].rpartition("/")[2]], path, defs)
    first, rest = path[0], path[1:]
    inner = schema.get("items") if first.isdigit() else schema.get("properties", {}).get(first)
    return inner is not None and reaches(inner, rest, defs)


def test_every_pointer_that_a_page_names_leads_somewhere() -> None:
    schemas = [load_schema(name).definition for name in DOCUMENTS]
    found = 0
    for page, text in TOLD.items():
        for span in spans(text):
            if re.fullmatch(r"(/[a-z0-9_]+)+", span) and not ADDRESSES.match(span):
                found += 1
                path = span[1:].split("/")
                assert any(reaches(one, path, one.get("$defs", {})) for one in schemas), (
                    page,
                    span,
                )
    assert found


# Upstream's names, and PostgreSQL's, Redis' and systemd's, which the program does not spell.
OF_OTHERS = {
    "bench", "publish", "package", "max_prepared_statements", "autovacuum_naptime", "limit_conn",
    "ignore_startup_parameters", "partial_score", "mtime", "py_spy",
}  # fmt: skip


def test_every_name_in_code_is_one_of_the_programs() -> None:
    """Members, settings, metrics, log events, tables: whatever was renamed is found here."""
    folders = ("cli", "config", "auth", "broker", "handlers", "db", "sandbox", "deploy", "tests",
               "bench")  # fmt: skip
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".sql", ".json", ".yaml", ".conf", ".service")]  # fmt: skip
    files += [ROOT / "server.py", ROOT / "Makefile"]
    files = [path for path in files if path != Path(__file__) and "assets" not in path.parts]
    program = "\n".join(path.read_text("utf-8") for path in files)
    words = set(re.findall(r"\w+", program)) | OF_OTHERS | {path.stem for path in files}
    for page, text in TOLD.items():
        named = {
            name
            for span in spans(text)
            for name in re.findall(r"(?<![\w/.<$-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w-])", span)
        }
        assert {name.removesuffix("_total") for name in named} <= words, page
        events = {span for span in spans(text) if re.fullmatch(r"[a-z_]+\.[a-z_]+", span)}
        suffixes = (".json", ".yaml", ".md", ".jsonl", ".py", ".html", ".conf")
        members = {each for each in events if each.partition(".")[0] in UPSTREAM_SECTIONS}
        for event in events - members:
            assert event.endswith(suffixes) or f'"{event}"' in program, (page, event)


# Of bakeoff's config and result: `run.seed` is a place in them.
UPSTREAM_SECTIONS = {"run", "config", "dataset", "server", "judge", "provenance", "signing", "job",
                     "hardware", "dumb_model_tier", "bench", "upload", "progress", "sig", "model",
                     "bundle", "signature", "receipt", "gpu_hardware", "system_software", "runs",
                     "run_hardware_metrics", "run_queue", "sandbox"}  # fmt: skip


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), (page, target)
            assert not anchor or anchor in anchors(path.read_text("utf-8")), (page, target)


# Bodies


def handlers(application: Any) -> dict[tuple[str, str], str]:
    """The schema of each address that reads JSON, by method and path as the pages spell it."""
    found = {}
    for rule in application.wildcard_router.rules:
        path = rule.matcher.regex.pattern.removesuffix("$").replace("\\", "")
        for pattern, name in PLACES.items():
            path = path.replace(pattern.replace("\\", ""), name)
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            source = inspect.getsource(getattr(rule.target, method.lower()))
            if read := re.search(r"read_json\(\"(\w+)\"\)", source):
                found[method, IDS.get(path, path)] = read[1]
    return found | {("POST", "/api/admin/queue"): "enqueue"}  # read in a worker


@pytest.mark.gen_test
async def test_every_body_that_a_page_shows_fits_its_schema(
    make_settings: Callable[..., Settings], sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        schemas = handlers(make_app(fleet.services))
    assert len(schemas) > 12
    shown = 0
    for page, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.S | re.M):
            for call in re.split(r"^curl ", block.replace("\\\n", " "), flags=re.M)[1:]:
                words = shlex.split(call)
                if "-d" not in words:
                    continue
                (url,) = [word for word in words if word.startswith("$URL")]
                method = words[words.index("-X") + 1] if "-X" in words else "POST"
                path = url.removeprefix("$URL").partition("?")[0]
                name = next(name for (of, at), name in schemas.items()
                            if of == method and fits(at, path))  # fmt: skip
                body = json.loads(words[words.index("-d") + 1])
                assert load_schema(name).violations(body) == (), (page, call)
                shown += 1
        # | `POST /address` | `{member, other?}` | ..., or: ... body `{member, other?}`
        for method, path, row in re.findall(r"^\| `(POST|DELETE) (/\S+)` \|(.*)$", text, re.M):
            notation = re.search(r"^ `(\{[^`]*\})`|body `(\{[^`]*\})`", row)
            if notation and (name := schemas.get((method, path))) and name != "register":
                told = notation[1] or notation[2]
                check_notation(told, load_schema(name).definition, (page, path))
                shown += 1
    assert shown > 20


@pytest.mark.gen_test
async def test_every_parameter_that_a_page_shows_is_taken(
    make_settings: Callable[..., Settings], sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        rules = make_app(fleet.services).wildcard_router.rules
    takes = [(rule.matcher.regex, rule.target.parameters) for rule in rules]  # type: ignore[attr-defined]
    shown = 0
    for page, text in PAGES.items():
        for path, query in re.findall(r"(/api/[\w$/{}-]+)\?([\w=&:.-]+)", text):
            at = re.sub(r"\$\w+|\{\w+\}", RUN, path)
            taken = next(of for regex, of in takes if regex.match(at))
            for name in re.findall(r"(\w+)=", query):
                assert any(name in names for names in taken.values()), (page, path)
                shown += 1
    assert shown > 5


def fits(pattern: str, path: str) -> bool:
    """Whether a path of an example, with $NAMES in it, is of an address."""
    return bool(re.fullmatch(re.sub(r"\\\{\w+\\\}", r"[^/]+", re.escape(pattern)), path))


def check_notation(notation: str, schema: dict[str, Any], where: Any) -> None:
    """`{a, b?}` names exactly the members of an object, and `?` those that may be left out."""
    flat = re.sub(r": [^,{}]*", "", re.sub(r"\[.*\]", "", notation))
    told = re.findall(r"(\w+)(\??)", flat)
    assert {name for name, _ in told} == schema["properties"].keys(), where
    assert {name for name, mark in told if not mark} == set(schema.get("required", ())), where


def test_what_a_table_calls_required_is_required() -> None:
    """The tables of a run's members and of a registration's, and the objects within them."""
    enqueue = load_schema("enqueue").definition
    run = enqueue["$defs"]["run"]
    registration = load_schema("register").definition["properties"]["registration"]
    for page, of in (("docs/api.md", run), ("docs/runners.md", registration)):
        rows = re.findall(
            r"^\| ((?:`\w+`(?:, )?)+) \| (required|optional) \|(.*)\|$", PAGES[page], re.M
        )
        marked = {name: mark for names, mark, _ in rows for name in re.findall(r"\w+", names)}
        assert marked.keys() == of["properties"].keys(), page
        assert {n for n, mark in marked.items() if mark == "required"} == set(of["required"]), page
        for names, _, told in rows:
            items = of["properties"].get(names.strip("`"), {}).get("items")
            if items and (notation := re.search(r"`(\{.*?\})`", told)):
                check_items(notation[1], items, names)


def check_items(notation: str, schema: dict[str, Any], where: str) -> None:
    """As check_notation, of what a list holds; its `tier` is told in words."""
    told = re.findall(r"(\w+)(\??)", notation)
    assert {name for name, mark in told if not mark} == set(schema["required"]), where
    assert {name for name, _ in told} == schema["properties"].keys(), where


def test_the_signer_that_the_example_policy_has_in_a_comment_can_be_put_in(tmp_path: Path) -> None:
    """The lines leave the comment, and the last line goes, as the comment says."""
    text = (ROOT / "config" / "signers.yaml").read_text("utf-8")
    comment = text[text.index("# trusted_identities:") :]
    put_in = re.sub(r"^# ", "", comment, flags=re.M).replace("trusted_identities: []\n", "")
    (tmp_path / "signers.yaml").write_text(text.replace(comment, put_in))
    policy = load_policy(tmp_path / "signers.yaml")
    assert [signer.identity for signer in policy.signers][1:] == ["someone@example.org"]


@pytest.mark.gen_test
async def test_lease_lost_means_what_the_runners_page_says(
    make_settings: Callable[..., Settings], sigstore: ThrowawaySigstore
) -> None:
    """To a heartbeat: submit what is finished, once. After a release or failure: the last word."""
    rule = PAGES["docs/runners.md"].partition("**A late result")[2].partition("\n- ")[0]
    assert "`lease_lost` to\n  a heartbeat" in rule
    assert "if the result is finished, submit it once" in rule
    assert "after a release, a failure or a sign-off" in rule
    async with open_fleet(make_settings(sweep_interval_s=0.05), sigstore) as fleet:
        runner = await fleet.sign_on()
        for ended_by in ("lapse", "release", "fail"):
            await fleet.enqueue()
            job = await runner.take()
            if ended_by == "lapse":
                await lapse(fleet, job)
            else:
                assert (await getattr(runner, ended_by)(job)).status_code == 200
            assert code_of_answer(await runner.heartbeat(job)) == (409, "lease_lost"), ended_by
            answer = await runner.submit(job)
            assert answer.status_code == (201 if ended_by == "lapse" else 409), answer.text
