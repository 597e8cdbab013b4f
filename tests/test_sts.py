"""Laws of a role's credentials, with a real issuer of tokens and SeaweedFS's own STS (`tests/issuer.py`).

Sessions end within seconds here. boto3 asks for new ones when less than ten minutes are left, so it asks with
each request, with the token that is in the file at that moment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from issuer import ROLE, Issuer, start_sts
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


def start_job(project: Project, sts: Storage, issuer: Issuer, runner: Path, *, mint_s: float) -> subprocess.Popen[str]:
    """`reconcile` by the job's script on a runner that has a token service, a role and no keys."""
    (runner / "bin").mkdir(parents=True, exist_ok=True)
    write_program(runner, "appliance", f'exec {sys.executable} -m appliance "$@"')
    with pytest.MonkeyPatch.context() as patch:
        use_role(sts, runner / "unused", patch)
        role = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    env = {
        **role, **QUIET, "PATH": f"{runner / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(runner),
        "PYTHONPATH": str(SCRIPT.parent.parent.parent), "OMP_NUM_THREADS": "1", "APPLIANCE_MINT_S": str(mint_s),
        "APPLIANCE_STORE": project.store.url, "ACTIONS_ID_TOKEN_REQUEST_URL": f"{issuer.url}/token?version=1",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "request",
    }  # fmt: skip
    return subprocess.Popen(
        [str(SCRIPT), "reconcile"], cwd=project.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def project(base: Path, sts: Storage, tmp_path: Path) -> Project:  # noqa: F811 - the fixture
    """A team's repository whose data is only in its remote."""
    made = build_project(tmp_path / "repository", base=base, storage=sts)
    made.write_recipe(training={**TRAINING, "epochs": 1})
    made.commit_data(rows=120)
    for folder in ("datasets", ".dvc/cache"):
        shutil.rmtree(made.root / folder)
    return made


@pytest.mark.slow
def test_a_training_longer_than_its_token_and_session_is_published(
    project: Project, sts: Storage, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's script mints on: data is pulled with the first token, and the version published with a later one."""
    monkeypatch.setattr(issuer, "life_s", 5)
    monkeypatch.setattr(issuer, "minted", [])
    job = start_job(project, sts, issuer, tmp_path / "runner", mint_s=0.5)
    _, said = job.communicate(timeout=250)
    assert job.returncode in (0, 3), said
    (version,) = project.versions()
    written = project.store.head(manifest_key("colours", version))
    assert written is not None
    assert written.modified is not None
    assert written.modified > issuer.minted[0] + SESSION_S, "neither the first token nor its last session were good"


@pytest.mark.slow
def test_a_token_that_ended_in_training_costs_a_message_and_no_training(
    project: Project, sts: Storage, issuer: Issuer, tmp_path: Path
) -> None:
    """Without a new token nothing is published, and it is said in one line; the next job publishes what was made."""
    runner = tmp_path / "runner"
    job = start_job(project, sts, issuer, runner, mint_s=1000)
    wait_for(lambda: list(runner.glob(".cache/appliance/runs/*/*/training/metrics.jsonl")), job)
    (token,) = runner.glob(".cache/appliance/runs/*/tokens/*")
    token.write_text(issuer.sign(life_s=-60))
    _, said = job.communicate(timeout=250)
    assert job.returncode == 1, said
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if "ExpiredToken" in line)
    assert "mint a new token into AWS_WEB_IDENTITY_TOKEN_FILE and run the same command again" in line
    assert (project.versions(), project.alias()) == ([], None)

    job = start_job(project, sts, issuer, runner, mint_s=1)
    _, said = job.communicate(timeout=250)
    assert job.returncode in (0, 3), said
    assert "steps" not in said, "it was trained already"
    assert len(project.versions()) == 1
