"""The command line: errors as the peer prints them, pid file, daemon mode, signals, stdio."""

import asyncio
import json
import os
import re
import signal
import stat
import time

from rig import images, transcript
from rig.cases import case
from rig.daemon import RawMonitor

SIZE = 16 * images.MIB
FILLED = images.blocks(SIZE) // 2


async def told(kind, *args, timeout=20):
    """(exit status, stderr with the program's name replaced)."""
    code, out, err = await images.tool(kind.path, *args, check=False, timeout=timeout)
    # getopt prints the program as it was called, the rest its base name
    names = rf"^({re.escape(kind.path)}|{re.escape(kind.name)}):"
    return code, re.sub(names, "PROG:", err, flags=re.M), out


WRONG = [
    ["--no-such-option"], ["-z"], ["stray"], ["--blockdev"], ["--pidfile"],
    ["--blockdev", "driver=no-such,node-name=x"],
    ["--blockdev", "driver=file,node-name=x,filename=/nowhere/image"],
    ["--blockdev", "driver=qcow2,node-name=x,file.driver=file,file.filename=/nowhere/image"],
    ["--blockdev", "driver=file,node-name=x"],
    ["--blockdev", "driver=file,node-name=x,filename=/nowhere,read-only"],
    ["--blockdev", "driver=file,node-name=x,filename=/nowhere,read-only=perhaps"],
    ["--blockdev", "driver=file,node-name=x,filename=/nowhere,what=1"],
    ["--blockdev", '{"driver":"file","node-name":"x","filename":"/nowhere/image"}'],
    ["--blockdev", '{"driver":'], ["--blockdev", '{"driver":"file","node-name":"x"}'],
    ["--blockdev", ""],
    ["--export", "type=nbd,id=e,node-name=nowhere"], ["--export", "type=no-such,id=e"],
    ["--export", "type=nbd"],
    ["--nbd-server", "addr.type=unix"], ["--nbd-server", "addr.type=unix,addr.path=/nowhere/s"],
    ["--nbd-server", "addr.type=inet,addr.host=127.0.0.1"],
    ["--monitor", "chardev=nowhere"], ["--monitor", "nowhere"],
    ["--chardev", "no-such,id=x"], ["--chardev", "socket,id=x"],
    ["--chardev", "socket,id=x,path=/nowhere/s,server=on,wait=off"],
    ["--object", "no-such,id=x"], ["--object", "iothread"],
]


@case("pair", timeout=120)
async def wrong_command_lines_fail_with_the_text_of_the_peer(world):
    ours, peers = [], []
    for args in WRONG:
        for kind, lines in ((world.kind, ours), (world.peer, peers)):
            code, err, out = await told(kind, *args)
            lines.append(f"{args}: exit {code}: {err.strip()}{out.strip()}")
    transcript.require_same(ours, peers, "errors of the command line")


@case("pair")
async def a_readline_monitor_is_refused_as_the_peer_does(world):
    lines = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        side = world.sub(name, kind)
        code, err, _ = await told(kind, "--chardev",
                                  f"socket,id=m,path={side.path('s')},server=on,wait=off",
                                  "--monitor", "chardev=m,mode=readline")
        lines.append(f"{code} {err.replace(side.folder, 'FOLDER')}")
    assert lines[0] == lines[1], lines


@case("both")
async def version_and_help_answer_and_end(world):
    code, err, out = await told(world.kind, "-V")
    assert code == 0 and not err and "10.0.2" in out, (code, err, out)
    assert out.startswith("liveblk" if world.kind.ours else "qemu-storage-daemon"), out
    for option in ("-h", "--help"):
        code, err, out = await told(world.kind, option)
        assert code == 0 and not err, (code, err)
        for name in ("--blockdev", "--chardev", "--daemonize", "--export", "--monitor",
                     "--nbd-server", "--object", "--pidfile", "--version", "--help"):
            assert name in out, f"{name} is not in the help"


@case("both")
async def everything_on_the_command_line_serves_a_guest(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon(
        "--object=iothread,id=io0",
        "--blockdev", f"driver=file,node-name=f,filename={a}",
        "--blockdev", json.dumps({"driver": "qcow2", "node-name": "a", "file": "f"}),
        "--export", "type=nbd,id=e,node-name=a,name=disk,writable=on")
    assert (await d.cmd("query-block-exports"))[0]["id"] == "e"
    guest = await world.guest(d.uri(), filled=FILLED)
    await guest.run(count=200, rate=5000)
    await guest.finish()
    await guest.verify()
    await d.quit()
    await images.check(a)


# -- pid file, daemon mode, signals -------------------------------------------------------------
async def until(condition, what, seconds=10):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        await asyncio.sleep(0.01)


@case("both")
async def the_pid_file_is_private_locked_and_removed_at_the_end(world):
    path = world.path("pid")
    d = await world.daemon("--pidfile", path)
    with open(path, encoding="utf-8") as f:
        assert int(f.read()) == d.pid
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    code, err, _ = await told(world.kind, "--pidfile", path)
    assert code == 1 and err.strip() == ("PROG: cannot create PID file: Cannot lock pid file: "
                                         "Resource temporarily unavailable"), (code, err)
    assert await d.terminate() == 0
    assert not os.path.exists(path), "the pid file is left behind"


@case("both")
async def daemonize_answers_when_ready_and_the_child_serves(world):
    pid_path, sock = world.path("pid"), world.path("qmp")
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    code, err, _ = await told(
        world.kind, "--daemonize", "--pidfile", pid_path,
        "--chardev", f"socket,id=m,path={sock},server=on,wait=off", "--monitor", "m",
        "--blockdev", f"driver=qcow2,node-name=a,file.driver=file,file.filename={a}")
    assert code == 0, (code, err)
    with open(pid_path, encoding="utf-8") as f:
        pid = int(f.read())
    try:
        async with RawMonitor(sock) as monitor:
            await monitor.say('{"execute":"qmp_capabilities"}')
            answer = await monitor.say(
                '{"execute":"query-named-block-nodes","arguments":{"flat":true}}')
            assert "a" in [n["node-name"] for n in answer["return"]]
            await monitor.say('{"execute":"quit"}')
        await until(lambda: not os.path.exists(pid_path), "the daemon does not end")
    finally:
        if os.path.exists(f"/proc/{pid}/cmdline"):
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as f:
                if world.folder in f.read():
                    os.kill(pid, signal.SIGKILL)


@case("pair")
async def daemonize_hands_the_failure_of_the_child_to_the_caller(world):
    lines = []
    for kind in (world.kind, world.peer):
        code, err, _ = await told(kind, "--daemonize", "--blockdev",
                                  "driver=file,node-name=x,filename=/nowhere/image")
        lines.append((code, err))
    assert lines[0] == lines[1] and lines[0][0] == 1, lines


@case("both")
async def every_ending_signal_ends_in_order(world):
    for n, sig in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        a = await images.filled(world.path(f"a{n}.qcow2"), SIZE, FILLED)
        d = await world.daemon()
        await d.add_qcow2("a", a)
        guest = await world.guest(await d.export("a"), filled=FILLED)
        await guest.run(rate=2000)
        await guest.progress()
        assert await d.terminate(sig) == 0, sig
        await guest.end()
        await images.check(a)


# -- a monitor on stdio -------------------------------------------------------------------------
@case("both")
async def a_monitor_on_stdio_carries_nothing_but_json(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    process = await asyncio.create_subprocess_exec(
        world.kind.path, "--chardev", "stdio,id=m", "--monitor", "chardev=m",
        "--blockdev", f"driver=qcow2,node-name=a,file.driver=file,file.filename={a}",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL)
    lines = [{"execute": "qmp_capabilities"}, {"execute": "blockdev-snapshot-sync", "arguments": {
        "node-name": "a", "snapshot-file": world.path("b.qcow2"), "snapshot-node-name": "b"}},
             {"execute": "quit", "id": "end"}]
    try:
        out, _ = await asyncio.wait_for(process.communicate(
            "".join(json.dumps(line) + "\n" for line in lines).encode()), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    answers = []
    for line in out.decode().splitlines():
        if line.startswith("Formatting") and not world.kind.ours:
            continue
        answers.append(json.loads(line))
    assert "QMP" in answers[0] and answers[-1] == {"return": {}, "id": "end"}, answers


@case("both")
async def two_monitors_both_get_the_events(world):
    extra = ("--chardev", "socket,id=mon1,path=raw.qmp,server=on,wait=off",
             "--monitor", "chardev=mon1,pretty=off")
    d = await world.daemon(*extra)
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), SIZE)
    await d.add_qcow2("a", a)
    await d.export("a")
    await d.add_qcow2("e", e)
    async with RawMonitor(world.path("raw.qmp")) as monitor:
        await monitor.say('{"execute":"qmp_capabilities"}')
        await d.cmd("blockdev-backup", device="a", target="e", sync="full", job_id="j")
        await d.job_gone("j")
        seen = []
        while seen[-1:] != ["null"]:
            message = await monitor.line()
            if message.get("event") == "JOB_STATUS_CHANGE":
                assert set(message["timestamp"]) == {"seconds", "microseconds"}, message
                seen.append(message["data"]["status"])
        assert seen[:2] == ["created", "running"] and seen[-2:] == ["concluded", "null"], seen
    await d.quit()


@case("pair")
async def a_pretty_monitor_prints_what_the_peer_prints(world):
    texts = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        side = world.sub(name, kind)
        await side.daemon("--chardev", "socket,id=mon1,path=raw.qmp,server=on,wait=off",
                          "--monitor", "chardev=mon1,pretty=on")
        reader, writer = await asyncio.open_unix_connection(side.path("raw.qmp"))
        writer.write(b'{"execute":"qmp_capabilities","id":[1,{"a":"\\u00e9"}]}\n'
                     b'{"execute":"nope","id":"last"}\n')
        text = b""
        while b"has not been found" not in text or not text.endswith(b"}\r\n}\r\n"):
            text += await asyncio.wait_for(reader.read(4096), 10)
        writer.close()
        text = text.split(b"capabilities", 1)[1]
        texts.append(text)
    assert texts[0] == texts[1], texts
