"""Search and download against a server on the loopback interface that does what real servers do on bad days."""
import base64
import email.utils
import gzip
import hashlib
import io
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.io.votable.tree import Info
from astropy.table import Table
from hypothesis import given, settings, strategies as st

from specnb.archive import ArchiveError, archive_query, data_sum, download, name_spellings, retry_after, search, stated_checksum, verify_fits


def fits_bytes(seed=0, n=20_000, checksum=True):
    "A one-row table file of some 240 kB."
    rng = np.random.default_rng(seed)
    table = Table({"WAVE": 5000 + 0.01 * np.arange(n)[None], "FLUX": rng.normal(100, 3, (1, n)).astype("f4")})
    out = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(table)]).writeto(out, checksum=checksum)
    return out.getvalue()


class Server:
    "Serves `files` under /file/ and `rows` under /tap. `faults[id]` is a list of callables or names, used up in order."
    def __init__(self, files=None, rows=()):
        self.files, self.rows, self.faults, self.log, self.tap_faults = dict(files or {}), list(rows), defaultdict(list), [], []
        self.active = self.most_active = 0
        self.lock, self.version, self.extra, self.ranges, self.tags, self.delay = threading.Lock(), {}, {}, True, True, 0.0
        here = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): pass
            def do_GET(self): here.file(self)
            def do_HEAD(self): here.file(self)
            def do_POST(self): here.tap(self)

        class Quiet(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False
            def handle_error(self, request, client_address): pass     # a client that went away is part of the tests

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.file_url, self.tap_url = self.url + "/file/", self.url + "/tap"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @staticmethod
    def send(handler, status, body=b"", length=None, **headers):
        handler.send_response(status)
        headers = {"Content-Length": len(body) if length is None else length, **{k.replace("_", "-"): v for k, v in headers.items()}}
        for k, v in headers.items(): handler.send_header(k, str(v))
        handler.end_headers()
        if handler.command != "HEAD": handler.wfile.write(body)

    def file(self, handler):
        name, asked = unquote(handler.path.rsplit("/", 1)[1]), handler.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        with self.lock:
            self.log.append((handler.command, name, start, dict(handler.headers)))
            self.active += 1; self.most_active = max(self.most_active, self.active)
        try:
            if self.delay: time.sleep(self.delay)
            fault = self.faults[name].pop(0) if self.faults[name] and handler.command == "GET" else None
            if callable(fault): return fault(handler)
            if name not in self.files: return self.send(handler, 404)
            body, total, whole = self.files[name], len(self.files[name]), self.files[name]
            tag = f'"{self.version.get(name, 1)}"'
            headers = {"Content_Type": "application/octet-stream", **({"ETag": tag} if self.tags else {}), **self.extra}
            resume = start and self.ranges and handler.headers.get("If-Range") in (None, tag)
            if resume and start >= total: return self.send(handler, 416, Content_Range=f"bytes */{total}")
            if resume: body, headers = body[start:], {**headers, "Content_Range": f"bytes {start}-{total - 1}/{total}"}
            status = 206 if resume else 200
            if fault == "damage": body = body[:len(body) // 2] + len(self.log).to_bytes(4, "big") + body[len(body) // 2 + 4:]
            if isinstance(fault, tuple) and fault[0] == "cut":
                self.send(handler, status, body[:fault[1]], length=len(body), **headers)
                handler.close_connection = True
                return
            if isinstance(fault, tuple) and fault[0] == "slow":
                handler.send_response(status)
                for k, v in {**headers, "Content-Length": len(body)}.items(): handler.send_header(k.replace("_", "-"), str(v))
                handler.end_headers()
                for i in range(0, len(body), fault[1]): handler.wfile.write(body[i:i + fault[1]]); handler.wfile.flush(); time.sleep(fault[2])
                return
            self.send(handler, status, body, **headers)
        finally:
            with self.lock: self.active -= 1

    def tap(self, handler):
        form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
        if self.tap_faults: return self.tap_faults.pop(0)(handler)
        db = sqlite3.connect(":memory:")
        db.execute("attach ':memory:' as ivoa"); db.row_factory = sqlite3.Row
        names = list(self.rows[0])
        db.execute(f"create table ivoa.ObsCore ({','.join(names)})")
        db.executemany(f"insert into ivoa.ObsCore values ({','.join('?' * len(names))})", [tuple(r.values()) for r in self.rows])
        found, limit = [{k: np.nan if v is None else v for k, v in dict(r).items()} for r in db.execute(form["QUERY"][0])], int(form["MAXREC"][0])
        db.close()
        self.send(handler, 200, votable(Table(found[:limit] or {n: [] for n in names}), "OVERFLOW" if len(found) > limit else "OK"), Content_Type="application/x-votable+xml")


def votable(table, status, text=""):
    "VOTable as a TAP service sends it."
    file = from_table(table)
    file.resources[0].type = "results"
    info = Info(name="QUERY_STATUS", value=status)
    info.content = text
    file.resources[0].infos.append(info)
    out = io.BytesIO()
    file.to_xml(out)
    return out.getvalue()


def observation(i, target="HD 1", ra=10.0, dec=-5.0, **other):
    return dict(dp_id=f"ADP.2015-01-01T00:00:00.{i:03d}", target_name=target, s_ra=ra, s_dec=dec, t_min=53000.0 + i, t_exptime=900.0, em_min=378e-9, em_max=691e-9, em_res_power=115000.0, snr=50.0 + i,
                instrument_name="HARPS", obs_collection="HARPS", proposal_id="072.C-0488(E)", obs_release_date="2008-01-01", access_estsize=240, dataproduct_type="spectrum") | other


@pytest.fixture(scope="module")
def contents(): return {f"ADP.2015-01-01T00:00:00.{i:03d}": fits_bytes(i) for i in range(6)}


@pytest.fixture
def server(contents, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    server = Server(contents, [observation(i) for i in range(6)])
    yield server
    server.close()


def fetch(server, ids, folder, **kwargs):
    return download(ids, folder, **{**dict(file_url=server.file_url, progress=False, backoff=0.02, timeout=5), **kwargs})


ONE = "ADP.2015-01-01T00:00:00.000"


def stored(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


# searching ---------------------------------------------------------------------------------------------------------------------------------------

def test_search_then_download(server, tmp_path, contents):
    products = search("HD1", tap_url=server.tap_url)
    assert len(products) == 6 and products.meta["complete"] and "ObsCore" in products.meta["query"]
    report = fetch(server, products, tmp_path)
    assert (report.status == "downloaded").all() and sorted(report["size"]) == sorted(map(len, contents.values()))
    assert sorted(stored(tmp_path).values()) == sorted(contents.values())
    assert set(report.file) == {name.replace(":", "_") + ".fits" for name in contents}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0, 360), st.floats(-90, 90), st.floats(1, 3600))
def test_box_holds_the_circle(ra, dec, radius):
    rng = np.random.default_rng(1)
    centre = SkyCoord(ra, dec, unit="deg")
    edge = centre.directional_offset_by(rng.uniform(0, 360, 12) * SkyCoord(0, 0, unit="deg").ra.unit, radius * 0.999 / 3600 * SkyCoord(0, 0, unit="deg").ra.unit)
    where = archive_query(position=(ra, dec), radius=radius).split("WHERE ")[1].split(" ORDER")[0]
    db = sqlite3.connect(":memory:")
    db.execute("create table o (dataproduct_type, instrument_name, s_ra, s_dec)")
    db.executemany("insert into o values ('spectrum', 'HARPS', ?, ?)", [(float(p.ra.deg), float(p.dec.deg)) for p in edge])
    assert db.execute(f"select count(*) from o where {where}").fetchone()[0] == 12
    db.close()


def test_circle_is_cut_out_of_its_box(server):
    server.rows = [observation(i, ra=10 + d, dec=-5 + e) for i, (d, e) in enumerate([(0, 0), (0.009, 0.009), (0.0099, 0), (0, 0.02)])]
    found = search(position=(10.0, -5.0), radius=36.0, tap_url=server.tap_url)
    assert list(found["t_min"]) == [53000.0, 53002.0]
    assert len(search(position=SkyCoord(10.0, -5.0, unit="deg"), radius=36.0, tap_url=server.tap_url)) == 2


def test_quotes_and_odd_names_reach_the_database_as_text(server):
    server.rows.append(observation(7, target="Barnard's star"))
    assert list(search("Barnard's star", tap_url=server.tap_url)["target_name"]) == ["Barnard's star"]
    assert len(search("x' OR '1'='1", tap_url=server.tap_url)) == 0
    for bad in ("", "  ", "a\x00b", "a\nb"):
        with pytest.raises(ArchiveError, match="no name to search for"): search(bad, tap_url=server.tap_url)


@pytest.mark.parametrize("typed", ["HD36705", "HD-36705", "hd 36705", "HD_036705"])
def test_spellings_meet_whatever_is_asked(typed):
    assert "HD 36705" in name_spellings(typed) and "HD-36705" in name_spellings(typed)


def test_missing_values_and_repeated_products(server):
    server.rows = [observation(0), observation(0), observation(1, snr=np.nan, target="")]
    found = search(instrument=None, tap_url=server.tap_url)
    assert list(found["target_name"]) == ["HD 1", ""] and np.ma.filled(found["snr"], np.nan)[0] == 50 and np.isnan(np.ma.filled(found["snr"], np.nan)[1])


def test_list_that_stops_early_says_so(server):
    with pytest.warns(UserWarning, match="stops at 2 rows"): found = search(max_rows=2, tap_url=server.tap_url)
    assert len(found) == 2 and found.meta["complete"] is False


def test_busy_service_is_asked_again(server):
    server.tap_faults = [lambda h: Server.send(h, 503, Retry_After="0.1"), lambda h: Server.send(h, 429, Retry_After="0.1")]
    assert len(search(tap_url=server.tap_url)) == 6


@pytest.mark.parametrize("fault, complaint", [
    (lambda h: Server.send(h, 200, b"<html>maintenance</html>", Content_Type="text/html"), "cannot be asked"), (lambda h: Server.send(h, 500), "cannot be asked"),
    (lambda h: Server.send(h, 200, votable(Table({"a": [1]}), "ERROR", "unknown column snr"), Content_Type="application/x-votable+xml"), "refuses the query.*snr"),
    (lambda h: Server.send(h, 200, votable(Table({"a": [1]}), "OK")[:300], Content_Type="application/x-votable+xml"), "cannot be asked")])
@pytest.mark.filterwarnings("ignore::astropy.io.votable.exceptions.VOWarning")
def test_broken_service_is_named(server, fault, complaint):
    server.tap_faults = [fault]
    with pytest.raises(ArchiveError, match=f"127.0.0.1.*{complaint}"): search(tap_url=server.tap_url)


# downloading -------------------------------------------------------------------------------------------------------------------------------------

def test_cut_connections_are_resumed_at_the_byte(server, tmp_path, contents):
    server.faults[ONE] = [("cut", 70_000), ("cut", 70_000), ("cut", 1)]
    report = fetch(server, ONE, tmp_path, retries=0, max_wait=1)
    starts = [start for _, _, start, _ in server.log]
    assert starts == [0, 70_000, 140_000, 140_001] and report.attempts[0] == 4
    assert stored(tmp_path) == {report.file[0]: contents[ONE]}


def test_no_progress_is_given_up_and_the_part_is_kept(server, tmp_path, contents):
    server.faults[ONE] = [("cut", 70_000)] + [("cut", 0)] * 10
    report = fetch(server, ONE, tmp_path, retries=3)
    assert report.status[0] == "failed" and report.attempts[0] == 5 and report.reason[0]
    assert [p.stat().st_size for p in tmp_path.glob("*.part")] == [70_000]
    server.faults.clear()
    again = fetch(server, ONE, tmp_path)
    assert again.status[0] == "resumed" and server.log[-1][2] == 70_000
    assert stored(tmp_path) == {again.file[0]: contents[ONE]}


def test_a_file_that_changed_in_between_is_fetched_anew(server, tmp_path):
    server.faults[ONE] = [("cut", 70_000)]
    assert fetch(server, ONE, tmp_path, retries=0, max_wait=0).status[0] == "failed"
    server.files[ONE], server.version[ONE] = fits_bytes(99), 2
    report = fetch(server, ONE, tmp_path)
    assert list(stored(tmp_path).values()) == [server.files[ONE]] and report.status[0] == "resumed"


@pytest.mark.parametrize("ranges, tags", [(False, True), (True, False), (False, False)])
def test_servers_without_ranges_or_tags_start_anew(server, tmp_path, contents, ranges, tags):
    server.ranges, server.tags = ranges, tags
    server.faults[ONE] = [("cut", 70_000)]
    report = fetch(server, ONE, tmp_path)
    assert report.attempts[0] == 2 and stored(tmp_path) == {report.file[0]: contents[ONE]}


def test_a_complete_part_only_needs_verifying(server, tmp_path, contents):
    server.faults[ONE] = [("cut", 70_000)]
    fetch(server, ONE, tmp_path, retries=0, max_wait=0)
    next(tmp_path.glob("*.part")).write_bytes(contents[ONE])       # killed between the last byte and the renaming
    report = fetch(server, ONE, tmp_path)
    assert stored(tmp_path) == {report.file[0]: contents[ONE]}


def test_a_damaged_note_is_no_obstacle(server, tmp_path, contents):
    server.faults[ONE] = [("cut", 70_000)]
    fetch(server, ONE, tmp_path, retries=0, max_wait=0)
    next(tmp_path.glob("*.part.json")).write_text('{"tag": ')
    report = fetch(server, ONE, tmp_path)
    assert stored(tmp_path) == {report.file[0]: contents[ONE]}


def test_damage_in_transit_is_found_by_the_file_itself(server, tmp_path, contents):
    server.faults[ONE] = ["damage"]
    report = fetch(server, ONE, tmp_path)
    assert report.attempts[0] == 2 and stored(tmp_path) == {report.file[0]: contents[ONE]}
    server.faults[ONE] = ["damage"] * 9
    lasting = fetch(server, ONE, tmp_path / "b", retries=2)
    assert lasting.status[0] == "failed" and "DATASUM" in lasting.reason[0] and lasting.attempts[0] == 3 and stored(tmp_path / "b") == {}


def stale(raw):
    "The file with a DATASUM that belongs to other data."
    at = raw.rindex(b"DATASUM = '") + 11
    return raw[:at] + bytes([49 + (raw[at] - 48) % 9]) + raw[at + 1:]


def test_a_stale_sum_of_the_archive_itself_is_told_from_damage(server, tmp_path):
    server.files[ONE] = stale(server.files[ONE])
    report = fetch(server, ONE, tmp_path / "a")
    assert report.attempts[0] == 2 and "DATASUM holds in 1 of 2" in report.checked[0] and list(stored(tmp_path / "a").values()) == [server.files[ONE]]
    server.extra = {"Repr_Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(server.files[ONE]).digest()).decode()}:"}
    assert fetch(server, ONE, tmp_path / "b").attempts[0] == 1


@pytest.mark.parametrize("header, value", [("Repr_Digest", lambda d: f"sha-256=:{d}:"), ("Digest", lambda d: f"SHA-256={d}")])
def test_stated_checksums_are_held_against_the_file(server, tmp_path, contents, header, value):
    right = base64.b64encode(hashlib.sha256(contents[ONE]).digest()).decode()
    server.extra = {header: value(right)}
    server.faults[ONE] = [("cut", 70_000)]
    good = fetch(server, ONE, tmp_path / "a")
    assert good.checked[0].startswith("sha256") and good.attempts[0] == 2
    server.extra = {header: value(base64.b64encode(hashlib.sha256(b"other").digest()).decode())}
    bad = fetch(server, ONE, tmp_path / "b", retries=1)
    assert bad.status[0] == "failed" and "sha256 is not the one stated" in bad.reason[0] and stored(tmp_path / "b") == {}


def test_checksums_known_beforehand(server, tmp_path, contents):
    md5 = hashlib.md5(contents[ONE]).hexdigest()
    assert fetch(server, ONE, tmp_path / "a", checksums={ONE: f"md5:{md5}"}).checked[0].startswith("md5")
    assert fetch(server, ONE, tmp_path / "b", checksums={ONE: "md5:" + "0" * 32}, retries=0).status[0] == "failed"


def test_content_md5_of_a_part_is_not_taken_for_the_whole():
    value = {"Content-MD5": base64.b64encode(hashlib.md5(b"part").digest()).decode()}
    assert stated_checksum(value, whole=True)[1] == hashlib.md5(b"part").hexdigest() and stated_checksum(value, whole=False) == ("", "")


def test_wrong_length_is_not_accepted(server, tmp_path, contents):
    server.faults[ONE] = [lambda h: Server.send(h, 200, contents[ONE][:-2880], ETag='"x"')]      # consistent headers, but the file lacks its end
    report = fetch(server, ONE, tmp_path)
    assert report.attempts[0] == 2 and stored(tmp_path) == {report.file[0]: contents[ONE]}


@pytest.mark.parametrize("fault, reason, mend", [
    (lambda h: Server.send(h, 200, b"<!DOCTYPE html><html><title>ESO SSO - Login</title>", Content_Type="text/html; charset=utf-8"), "web page.*ESO SSO - Login", "token="),
    (lambda h: Server.send(h, 401), "refuses access", "token="), (lambda h: Server.send(h, 403), "refuses access", "token="), (lambda h: Server.send(h, 410), "no such file", "check the id"),
    (lambda h: Server.send(h, 503, Retry_After="100000"), "busy", "later")])
def test_hopeless_answers_are_not_repeated(server, tmp_path, fault, reason, mend):
    server.faults[ONE] = [fault]
    report = fetch(server, ONE, tmp_path)
    assert report.status[0] == "failed" and report.attempts[0] == 1 and stored(tmp_path) == {}
    assert pd.Series(report.reason).str.contains(reason).all() and mend in report.mend[0]


def test_login_page_that_pretends_to_be_a_file(server, tmp_path):
    server.faults[ONE] = [lambda h: Server.send(h, 200, b"<!DOCTYPE html><title>Login</title>", Content_Type="application/fits")] * 9
    report = fetch(server, ONE, tmp_path, retries=1)
    assert report.status[0] == "failed" and "DOCTYPE html" in report.reason[0] and stored(tmp_path) == {}


@pytest.mark.parametrize("fault", [lambda h: Server.send(h, 500), lambda h: Server.send(h, 502), lambda h: Server.send(h, 503), lambda h: Server.send(h, 429, Retry_After="0.05"), hang_up])
def test_passing_trouble_passes(server, tmp_path, contents, fault):
    server.faults[ONE] = [fault, fault]
    report = fetch(server, ONE, tmp_path)
    assert report.attempts[0] == 3 and stored(tmp_path) == {report.file[0]: contents[ONE]}


def test_retry_after_is_obeyed_by_all_transfers(server, tmp_path, contents):
    server.faults[ONE] = [lambda h: Server.send(h, 503, Retry_After="1")]
    begun = time.monotonic()
    report = fetch(server, list(contents), tmp_path, n_parallel=2)
    assert (report.status == "downloaded").all() and 1.0 <= time.monotonic() - begun < 8


def test_dates_in_retry_after():
    assert 50 < retry_after(email.utils.formatdate(time.time() + 60, usegmt=True), 1.0) <= 60
    assert retry_after("-5", 1.0) == 0 and retry_after("", 7.0) == 7


def test_never_more_at_a_time_than_asked_for(server, tmp_path, contents):
    server.delay = 0.05
    fetch(server, list(contents), tmp_path / "a", n_parallel=2)
    assert server.most_active == 2
    server.most_active = 0
    fetch(server, list(contents), tmp_path / "b", n_parallel=1)
    assert server.most_active == 1
    for n in (0, 9):
        with pytest.raises(ArchiveError, match="between 1 and 8"): fetch(server, [ONE], tmp_path, n_parallel=n)


def test_one_bad_file_does_not_stop_the_others(server, tmp_path, contents):
    ids = [*contents, "ADP.1999-01-01T00:00:00.000"]
    server.faults[ids[2]] = ["damage"] * 9
    report = fetch(server, ids, tmp_path, retries=1)
    assert list(report.id) == ids and list(report.status) == ["downloaded"] * 2 + ["failed"] + ["downloaded"] * 3 + ["failed"]
    assert (report.mend[report.status == "failed"] != "").all() and len(stored(tmp_path)) == 5


def test_compressed_files_are_named_so_and_found_again(server, tmp_path, contents):
    server.files[ONE] = gzip.compress(contents[ONE], mtime=0)
    assert fetch(server, ONE, tmp_path).file[0].endswith(".fits.gz")
    n = len(server.log)
    assert fetch(server, ONE, tmp_path).status[0] == "present" and len(server.log) == n


def test_dry_run_writes_and_fetches_nothing(server, tmp_path, contents):
    products = search(tap_url=server.tap_url)
    report = fetch(server, products, tmp_path / "new", dry_run=True)
    assert (report.status == "planned").all() and report.attrs["total_bytes"] == 6 * 240_000 and not server.log and not (tmp_path / "new").exists()
    plain = fetch(server, [ONE, "ADP.1999-01-01T00:00:00.000"], tmp_path / "new", dry_run=True)
    assert plain["size"][0] == len(contents[ONE]) and np.isnan(plain["size"][1]) and {c for c, *_ in server.log} == {"HEAD"}
    assert plain.attrs["total_bytes"] == len(contents[ONE])


def test_a_disk_that_is_too_small_is_noticed_before(server, tmp_path):
    products = search(tap_url=server.tap_url)
    products["access_estsize"] = 10**12
    with pytest.raises(ArchiveError, match="GB to fetch"): fetch(server, products, tmp_path)
    assert not server.log


@pytest.mark.parametrize("bad", ["../../x.fits", "/etc/passwd", "a b c d", "ADP?x=1", "", "ADP..2015", "ADP\n2015", "a" * 200])
def test_ids_that_are_none_are_refused(server, tmp_path, bad):
    with pytest.raises(ArchiveError, match="not the id of a product"): fetch(server, [ONE, bad], tmp_path)
    assert not server.log and stored(tmp_path) == {}


def test_table_without_ids(server, tmp_path):
    with pytest.raises(ArchiveError, match="no column 'dp_id'"): fetch(server, pd.DataFrame({"id": [ONE]}), tmp_path)


def test_token_goes_to_the_file_server_only(server, tmp_path):
    other = Server({ONE: fits_bytes(0)})
    server.faults[ONE] = [lambda h: Server.send(h, 302, Location=f"http://localhost:{other.http.server_port}/file/{ONE}")]
    try: report = fetch(server, ONE, tmp_path, token="secret")
    finally: other.close()
    assert report.status[0] == "downloaded"
    assert server.log[0][3]["Authorization"] == "Bearer secret" and "Authorization" not in other.log[0][3]
    assert "specnb" in server.log[0][3]["User-Agent"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_stopped_at_any_moment_the_same_call_resumes(server, tmp_path, contents, how):
    for name in contents: server.faults[name] = [("slow", 8192, 0.05)]
    code = f"from specnb.archive import download; download({list(contents)!r}, {str(tmp_path)!r}, file_url={server.file_url!r}, progress=False)"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)              # also where a shell in the background has its children ignore Ctrl-C
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while sum(p.stat().st_size for p in tmp_path.glob("*.part")) < 60_000 and time.monotonic() < deadline: time.sleep(0.02)
    process.send_signal(how)
    stderr = process.communicate(timeout=30)[1].decode()
    assert process.returncode != 0 and (how == signal.SIGKILL or "KeyboardInterrupt" in stderr)
    assert not list(tmp_path.glob("*.fits")) and list(tmp_path.glob("*.part"))
    server.faults.clear(); server.log.clear()
    report = fetch(server, list(contents), tmp_path)
    assert "resumed" in set(report.status) and max(start for _, _, start, _ in server.log) > 0
    assert stored(tmp_path) == {row.file: contents[row.id] for row in report.itertuples()}


# files -------------------------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.binary(max_size=400).map(lambda b: b + b"\0" * (-len(b) % 4)))
def test_data_sum_is_that_of_astropy(data):
    hdu = fits.ImageHDU(np.frombuffer(data or b"\0\0\0\0", "u1"))
    hdu.add_datasum()
    padded = (data or b"\0\0\0\0") + b"\0" * (-len(data or b"0000") % 2880)
    assert data_sum(padded) == int(hdu.header["DATASUM"])


def test_every_cut_and_many_damages_are_found(tmp_path):
    whole, path, rng = fits_bytes(0, n=500), tmp_path / "a.fits", np.random.default_rng(0)
    for end in [0, 5, 80, 2879, 2881, 5760, len(whole) - 2880, *rng.integers(0, len(whole) - 2880, 20)]:
        path.write_bytes(whole[:end])
        with pytest.raises(ArchiveError, match="a.fits"): verify_fits(path)
    with fits.open(io.BytesIO(whole)) as hdus: start, span = (hdus[1].fileinfo()[k] for k in ("datLoc", "datSpan"))
    for at in rng.integers(start, start + span, 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        with pytest.raises(ArchiveError, match="a.fits"): verify_fits(path)


def test_a_corrected_header_card_is_no_damage(tmp_path):
    path = tmp_path / "a.fits"
    path.write_bytes(fits_bytes(0, n=100))
    raw = path.read_bytes().replace(b"EXTEND  =                    T", b"EXTEND  =                    F")
    path.write_bytes(raw)
    assert verify_fits(path).startswith("FITS, DATASUM")


def test_real_products_verify():
    root = next((p / "shared" / "data" for p in Path(__file__).resolve().parents if (p / "shared" / "data").is_dir()), None)
    if root is None: pytest.skip("the shared spectra are not here")
    files = [p for folder in ("eso_adp_uves", "harps_full", "uves_pipeline_images", "lamost_dr1") for p in sorted((root / folder).glob("*.fits*"))]
    checked = {p.name: verify_fits(p, strict=not p.name.startswith("HARPS.")) for p in files}      # the HARPS pipeline leaves sums of the raw frame
    assert len(checked) > 40 and all(v.startswith("FITS") for v in checked.values())
    assert sum("holds in 2 of 2" in v for v in checked.values()) == 2
    for path in files:
        if path.name.startswith("HARPS."):
            with pytest.raises(ArchiveError, match="DATASUM does not hold"): verify_fits(path)


def test_importing_opens_no_connection():
    code = "import socket\ndef no(*a, **k): raise SystemExit('connection')\nsocket.socket.connect = no\nsocket.getaddrinfo = no\nimport specnb.archive, specnb.catalogue"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
