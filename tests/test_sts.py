"""Laws of a role's credentials, with a real issuer of tokens and SeaweedFS's own STS (`tests/issuer.py`).

Sessions end within seconds here. boto3 asks for new ones when less than ten minutes are left, so it asks with
each request, with the token that is in the file at that moment. Whole jobs run by the job's script: in the
environment of the runner (marker `slow`), and in the image (`make image-test`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from containers import USER, Engine, give_away, open_engine, open_rootless
from issuer import ROLE, Issuer, start_sts
from test_image import engine, wait_until  # noqa: F401 - one is a fixture
from test_job_script import SCRIPT, write_program
from test_reconcile import QUIET, TRAINING, Project, base, build_project, wait_for  # noqa: F401 - one is a fixture
from test_registry import promote, publish_new, snapshot
from test_store import check_one_line, every_call, write_file

from appliance import registry
from appliance.data.pointer import load_pointer, pull_data
from appliance.demo.storage import Storage
from appliance.digest import digest_bytes
from appliance.errors import DatasetError, StoreError
from appliance.registry.layout import manifest_key
from appliance.store import Store, open_store
from appliance.store.s3 import S3Store

SESSION_S = 3


@dataclass(frozen=True)
class Job:
    """What a job has: a file for its token and a place in the registry; `admin` is the same place with keys."""

    issuer: Issuer
    token: Path
    admin: S3Store

    @property
    def url(self) -> str:
        """Where the registry is."""
        return self.admin.url

    def mint(self, token: str) -> None:
        """Put the token there in one step, as the job's script does."""
        draft = self.token.with_suffix(".new")
        draft.write_text(token)
        draft.replace(self.token)

    def open(self, token: str) -> S3Store:
        """The registry as a job with this token has it."""
        self.mint(token)
        store = open_store(self.url)
        assert isinstance(store, S3Store)
        return store


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """The token service."""
    with Issuer().run() as running:
        yield running


@pytest.fixture(scope="module")
def sts(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """The store that trusts it."""
    with start_sts(tmp_path_factory.mktemp("sts") / "server", issuer, session=f"{SESSION_S}s") as running:
        yield running


@pytest.fixture(scope="module")
def admin(sts: Storage) -> S3Store:
    """The whole bucket `registry`, with the server's own keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sts.environment.items():
            patch.setenv(name, value)
        store = open_store("s3://registry")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def place(admin: S3Store, request: pytest.FixtureRequest) -> S3Store:
    """This test's part of the bucket."""
    return replace(admin, prefix=digest_bytes(request.node.nodeid.encode())[:16])


@pytest.fixture
def job(issuer: Issuer, sts: Storage, place: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """This process as a job with a role and no keys."""
    use_role(sts, tmp_path / "token", monkeypatch)
    return Job(issuer, tmp_path / "token", place)


def use_role(sts: Storage, token: Path, patch: pytest.MonkeyPatch) -> None:
    """The AWS variables that `.github/scripts/appliance` leaves a job with."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": sts.endpoint, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_ROLE_ARN": ROLE,
        "AWS_ROLE_SESSION_NAME": "appliance-1", "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
    }.items():  # fmt: skip
        patch.setenv(name, value)


def test_a_role_publishes_and_pulls_after_its_first_session_and_token_are_over(job: Job, tmp_path: Path) -> None:
    """The same store goes on with the token that was minted meanwhile: this is what a long training relies on."""
    ends = time.time() + 6
    store = job.open(job.issuer.sign(life_s=6))
    first = publish_new(store, tmp_path)
    keys = boto3.session.Session().get_credentials().get_frozen_credentials()
    time.sleep(ends + 1 - time.time())
    before = snapshot(job.admin)
    with pytest.raises(StoreError) as early:
        publish_new(store, tmp_path, "early")
    check_one_line(early, "ExpiredToken", "mint a new token")
    assert snapshot(job.admin) == before
    job.mint(job.issuer.sign())
    second = publish_new(store, tmp_path, "second")
    promote(store, second)
    registry.pull(store, "demo@production", tmp_path / "out")
    assert {v.version for v in registry.list_versions(job.admin, "demo")} == {first, second}

    with pytest.MonkeyPatch.context() as patch:  # and the first session did not live on
        patch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE")
        patch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
        patch.setenv("AWS_SESSION_TOKEN", keys.token)
        with pytest.raises(StoreError) as fault:
            open_store(job.url).get("FORMAT.json")
    check_one_line(fault, "credentials refused by", "AWS_SESSION_TOKEN")


def test_a_role_has_the_rights_that_the_page_gives_it(job: Job, tmp_path: Path) -> None:
    """The trainer of docs/gitops.md writes blobs of any size, and has no right to delete or to write elsewhere."""
    store = job.open(job.issuer.sign())
    for size in (1, 65 << 20):
        sha256 = write_file(tmp_path / "file", bytes(size))
        store.put_file(f"blobs/{size}", tmp_path / "file", sha256=sha256)
        assert store.digest(f"blobs/{size}")[0] == sha256
    for call in (
        lambda: store.delete("blobs/1"),
        lambda: store.put("gc/plan.json", b""),
        lambda: store.put("models/demo/elsewhere", b""),
    ):
        with pytest.raises(StoreError) as fault:
            call()
        check_one_line(fault, "AccessDenied", "the rights of this identity")
    assert store.head("blobs/1") is not None


@pytest.mark.slow
def test_a_token_that_ends_at_any_write_leaves_a_sound_registry(job: Job, tmp_path: Path) -> None:
    """The alias stays or has moved, what is listed is whole; the next job's calls finish it."""
    finished = []
    for count in range(6):
        here = replace(job, admin=replace(job.admin, prefix=f"{job.admin.prefix}-{count}"))
        first = publish_new(here.admin, tmp_path)
        promote(here.admin, first)
        before = snapshot(here.admin)
        store = here.open(job.issuer.sign())
        end_after_writes(store, count, lambda: job.mint(job.issuer.sign(life_s=-60)))
        with contextlib.suppress(StoreError):
            release(store, tmp_path)
            finished.append(count)
        if count == 0:
            assert snapshot(here.admin) == before
        check_whole(here.admin, first, tmp_path / f"out{count}")
        second = release(here.open(job.issuer.sign()), tmp_path)
        assert registry.resolve(here.admin, "demo@production")[0] == second
    assert finished == [5], "after two new blobs, the manifest, the history and the alias"


def release(store: Store, folder: Path) -> str:
    """Publish the second version and promote it."""
    version = publish_new(store, folder, "second")
    promote(store, version)
    return version


def end_after_writes(store: S3Store, count: int, end: Callable[[], object]) -> None:
    """Call `end` after so many objects were written."""
    left = [count]

    def write(**_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            end()

    if count == 0:
        end()
    store.clients.once.meta.events.register("after-call.s3.PutObject", write)


def check_whole(admin: Store, first: str, out: Path) -> None:
    """No damage, and every version that is listed can be pulled."""
    assert registry.check_registry(admin, now=time.time(), read="all").is_sound
    versions = [v.version for v in registry.list_versions(admin, "demo")]
    assert first in versions
    for version in versions:
        registry.pull(admin, f"demo@{version}", out / version)


REFUSED = "AWS_ROLE_ARN, and that the role trusts the issuer, audience and subject of this"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ours, _: ours.sign(life_s=-60), "ExpiredToken|mint a new token into AWS_WEB_IDENTITY_TOKEN_FILE"),
        (lambda _, other: other.sign(), REFUSED),
        (lambda ours, other: other.sign(iss=ours.url), REFUSED),
        (lambda ours, _: ours.sign(aud="somebody"), f"audience|{REFUSED}"),
        (lambda ours, _: ours.sign(sub="repo:team/models:environment:production"), REFUSED),
        (lambda ours, _: ours.sign().partition(".")[0], REFUSED),
        (lambda *_: "", "AWS_WEB_IDENTITY_TOKEN_FILE names a file with this job's token"),
        (lambda *_: None, "No such file|AWS_WEB_IDENTITY_TOKEN_FILE names a file with this job's token"),
    ],
    ids=["expired", "issuer", "signature", "audience", "subject", "torn", "empty", "gone"],
)
def test_a_token_that_is_not_taken_is_one_line_for_every_call(
    job: Job, tmp_path: Path, make: Callable[[Issuer, Issuer], str | None], words: str
) -> None:
    """It names the place and what to look at, not the keys that this job has not, and never the token."""
    with Issuer().run() as other:
        token = make(job.issuer, other)
    store = job.open(token or "")
    if token is None:
        job.token.unlink()
    for call in every_call(store, tmp_path):
        with pytest.raises(StoreError) as fault:
            call()
        check_one_line(fault, f"{job.url}: no credentials (", *words.split("|"))
        assert type(fault.value) is StoreError, "neither absent nor changed: nothing is known of the object"
        assert "AWS_ACCESS_KEY_ID" not in str(fault.value)
        assert not token or token not in str(fault.value)
    assert snapshot(job.admin) == {}


def test_a_role_that_is_not_there_is_one_line(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong variable is told as such."""
    for role, words in ((f"{ROLE}-2", "trainer-2"), ("trainer", "Invalid length for parameter RoleArn")):
        monkeypatch.setenv("AWS_ROLE_ARN", role)
        with pytest.raises(StoreError) as fault:
            job.open(job.issuer.sign()).get("k")
        check_one_line(fault, "no credentials (", words, "check AWS_ROLE_ARN")


def test_a_token_that_is_not_taken_is_told_by_the_data_too(job: Job, sts: Storage, tmp_path: Path) -> None:
    """DVC's last line says only how many files it lacks."""
    (tmp_path / ".dvc").mkdir()
    remote = f"['remote \"store\"']\n    url = s3://datasets/x\n    endpointurl = {sts.endpoint}\n"
    (tmp_path / ".dvc" / "config").write_text(f"[core]\n    no_scm = True\n    remote = store\n{remote}")
    (tmp_path / "datasets.dvc").write_text(
        f"outs:\n- md5: {'0' * 32}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: datasets\n"
    )
    for token, words in (
        (job.issuer.sign(sub="repo:team/other:environment:training"), REFUSED),
        (job.issuer.sign(life_s=-60), "has run out"),
        (None, "AWS_WEB_IDENTITY_TOKEN_FILE names a file with this job's token"),
    ):
        job.mint(token or "")
        if token is None:
            job.token.unlink()
        with pytest.raises(DatasetError) as fault:
            pull_data(load_pointer(tmp_path / "datasets.dvc"), root=tmp_path)
        check_one_line(fault, "datasets.dvc: dvc pull failed: ", words)


def test_an_sts_out_of_reach_is_named_within_seconds(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address, not the store's, which is well."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    store, began = job.open(job.issuer.sign()), time.monotonic()
    with pytest.raises(StoreError) as fault:
        store.put("k", b"", if_none_match=True)
    check_one_line(fault, "http://127.0.0.1:9", "AWS_ENDPOINT_URL_STS")
    assert time.monotonic() - began < 30


def test_a_session_that_has_run_out_on_arrival_names_the_clock(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is far ahead sees every session so."""
    with start_sts(tmp_path / "server", issuer, session="1ms") as sts:
        use_role(sts, tmp_path / "token", monkeypatch)
        (tmp_path / "token").write_text(issuer.sign())
        with pytest.raises(StoreError) as fault:
            open_store("s3://registry/x").get("k")
    check_one_line(fault, "s3://registry/x: no credentials (", "set the clock of this machine")


@dataclass(frozen=True)
class Runner:
    """A machine for jobs: its folder, what its jobs find in their environment, and whom they run as."""

    home: Path
    environment: Mapping[str, str]
    user: int

    @property
    def runs(self) -> Path:
        """What jobs of one repository leave behind."""
        return self.home / ".cache" / "appliance" / "runs" / "repository"

    @property
    def tokens(self) -> list[Path]:
        """The tokens that are there now."""
        return list(self.runs.glob("tokens/*"))

    def start(self, root: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """A job of the repository `root`, by the script in it."""
        env = {**QUIET, **self.environment, **variables, "HOME": str(self.home)}
        return subprocess.Popen(
            [".github/scripts/appliance", *arguments], cwd=root, env=env, user=self.user, group=self.user,
            extra_groups=[], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


def start_reconcile(
    runner: Runner, project: Project, sts: Storage, issuer: Issuer, *, mint_s: float
) -> subprocess.Popen[str]:
    """`reconcile` with a token service, a role and no keys."""
    with pytest.MonkeyPatch.context() as patch:
        use_role(sts, runner.home / "unused", patch)
        role = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    store = {"APPLIANCE_STORE": project.store.url}
    return runner.start(project.root, "reconcile", **role, **store, **offer_tokens(issuer, mint_s=mint_s))


def offer_tokens(issuer: Issuer, *, mint_s: float) -> dict[str, str]:
    """What a runner tells a job that has `id-token: write`; the script asks again after `mint_s`."""
    return {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{issuer.url}/token?version=1",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "request",
        "APPLIANCE_MINT_S": str(mint_s),
    }


@pytest.fixture
def ground() -> Iterator[Path]:
    """A folder that every user may enter, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def copy_script(root: Path) -> None:
    """Put the job's script where a repository has it."""
    (root / ".github" / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, root / ".github" / "scripts")


@pytest.fixture
def project(base: Path, sts: Storage, ground: Path) -> Project:  # noqa: F811 - the fixture
    """A team's repository with the job's script, whose data is only in its remote."""
    made = build_project(ground / "repository", base=base, storage=sts)
    copy_script(made.root)
    made.write_recipe(training={**TRAINING, "epochs": 1})
    made.commit_data(rows=120)
    for folder in ("datasets", ".dvc/cache"):
        shutil.rmtree(made.root / folder)
    return made


@pytest.fixture
def own(ground: Path) -> Runner:
    """A runner that has the appliance, and runs jobs as this user."""
    (ground / "runner" / "bin").mkdir(parents=True)
    write_program(ground / "runner", "appliance", f'exec {sys.executable} -m appliance "$@"')
    environment = {
        "PATH": f"{ground / 'runner' / 'bin'}:/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    }  # fmt: skip
    return Runner(ground / "runner", environment, os.getuid())


@pytest.fixture
def contained(engine: Engine, ground: Path, project: Project) -> Iterator[Runner]:  # noqa: F811 - the fixture
    """A runner that has the image and a container engine of root's, and runs jobs as another user, as docker's do."""
    (ground / "engine").mkdir()
    (ground / "runner").mkdir()
    for folder in (ground / "runner", project.root):
        give_away(folder)
    with open_engine(ground / "engine").serve() as environment:
        named = {"APPLIANCE_IMAGE": engine.find_digest(), "RUNNER_NAME": f"role-{os.getpid()}"}
        yield Runner(ground / "runner", {**environment, **named}, USER)
        for left in find_containers(engine):
            engine.call("kill", left)


def find_containers(engine: Engine) -> list[str]:  # noqa: F811
    """The ones of that runner's jobs which are there now."""
    return engine.call("ps", "--quiet", "--filter", f"label=appliance.runner=role-{os.getpid()}").split()


@pytest.fixture(
    params=[pytest.param("own", marks=pytest.mark.slow), pytest.param("contained", marks=pytest.mark.image)]
)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Both ways to run a job."""
    found: Runner = request.getfixturevalue(request.param)
    return found


def check_left(runner: Runner, project: Project) -> None:
    """No token is left behind, and nothing that the next job of this user could not replace."""
    assert runner.tokens == []
    left = [*runner.home.rglob("*"), *project.root.rglob("*")]
    assert {place.lstat().st_uid for place in left} == {runner.user}


def test_a_training_longer_than_its_token_and_session_is_published(
    runner: Runner, project: Project, sts: Storage, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's script mints on: data is pulled with the first token, and the version published with a later one."""
    monkeypatch.setattr(issuer, "life_s", 5)
    monkeypatch.setattr(issuer, "minted", [])
    job = start_reconcile(runner, project, sts, issuer, mint_s=0.5)
    _, said = job.communicate(timeout=250)
    assert job.returncode in (0, 3), said
    (version,) = project.versions()
    written = project.store.head(manifest_key("colours", version))
    assert written is not None
    assert written.modified is not None
    assert written.modified > issuer.minted[0] + SESSION_S, "neither the first token nor its last session were good"
    check_left(runner, project)


def test_a_token_that_ended_in_training_costs_a_message_and_no_training(
    runner: Runner, project: Project, sts: Storage, issuer: Issuer
) -> None:
    """Without a new token nothing is published, and it is said in one line; the next job publishes what was made."""
    job = start_reconcile(runner, project, sts, issuer, mint_s=1000)
    wait_for(lambda: list(runner.runs.glob("*/training/metrics.jsonl")), job)
    (token,) = runner.tokens
    token.write_text(issuer.sign(life_s=-60))
    _, said = job.communicate(timeout=250)
    assert job.returncode == 1, said
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if "ExpiredToken" in line)
    assert "mint a new token into AWS_WEB_IDENTITY_TOKEN_FILE and run the same command again" in line
    assert (project.versions(), project.alias()) == ([], None)

    job = start_reconcile(runner, project, sts, issuer, mint_s=1)
    _, said = job.communicate(timeout=250)
    assert job.returncode in (0, 3), said
    assert "steps" not in said, "it was trained already"
    assert len(project.versions()) == 1
    check_left(runner, project)


@pytest.mark.image
def test_a_stop_ends_container_and_role_and_the_next_job_goes_on(
    contained: Runner,
    project: Project,
    sts: Storage,
    issuer: Issuer,
    engine: Engine,  # noqa: F811 - the fixture
) -> None:
    """The container has the role, not the means to mint; after SIGTERM a checkpoint is there, and no token."""
    project.write_recipe(training={**TRAINING, "epochs": 12})
    project.run("git", "-c", "safe.directory=*", "commit", "--quiet", "--all", "--message", "longer")
    give_away(project.root)
    job = start_reconcile(contained, project, sts, issuer, mint_s=0.5)
    wait_until(lambda: list(contained.runs.glob("*/training/checkpoints/checkpoint-*/sealed.json")), job)
    (running,) = find_containers(engine)
    (facts,) = json.loads(engine.call("inspect", running))
    assert facts["Config"]["User"] == f"{USER}:{USER}"
    assert facts["HostConfig"]["ReadonlyRootfs"]
    variables = dict(word.split("=", 1) for word in facts["Config"]["Env"])
    assert variables["AWS_ROLE_ARN"] == ROLE
    assert not variables.keys() & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert not [name for name in variables if name.startswith("ACTIONS_")]
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=180)
    assert job.returncode == 33, said
    assert find_containers(engine) == []
    check_left(contained, project)
    minted = len(issuer.minted)
    job = start_reconcile(contained, project, sts, issuer, mint_s=1000)
    _, said = job.communicate(timeout=250)
    assert job.returncode in (0, 3), said
    assert "resuming from step" in said
    assert len(issuer.minted) == minted + 1, "and nobody minted on for the job before"
    assert len(project.versions()) == 1


@pytest.mark.image
@pytest.mark.usefixtures("engine")
def test_a_rootless_engine_hands_over_every_token(ground: Path, issuer: Issuer) -> None:
    """Its root is this user: token, checkout and folders are its own there, and all else is sealed."""
    copy_script(ground / "repository")
    (ground / "home").mkdir()
    give_away(ground / "repository")
    show = 'cat "$AWS_WEB_IDENTITY_TOKEN_FILE"; echo'
    write = "touch /out/a /cache/a /workspace/a /tmp/a; touch /a 2>/dev/null || echo sealed"
    with open_rootless(ground / "home") as environment:
        runner = Runner(ground / "home", environment, USER)
        tokens = offer_tokens(issuer, mint_s=0.5)
        job = runner.start(
            ground / "repository", "sh", "-c", f"{show}; {write}; sleep 2; {show}", **tokens, AWS_ROLE_ARN=ROLE
        )
        output, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
    first, sealed, last = output.splitlines()
    assert first.count(".") == last.count(".") == 2
    assert first != last
    assert sealed == "sealed"
    assert (ground / "repository" / "a").stat().st_uid == USER
    assert runner.tokens == []
