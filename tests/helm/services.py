"""Services of the loopback cluster: what comes to a Service's address goes on to a ready pod. Knows no HTTP."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Mapping

from tests.helm.api_server.store import Object, Store
from tests.helm.pods import is_ready

PORTS = "loopback/port-"


def port_of(pod: Object, port: int | str) -> int:
    """Where a pod really listens: a named port's number, and what its node put in the number's place."""
    if isinstance(port, str):
        named = [each for c in pod["spec"]["containers"] for each in c.get("ports") or [] if each.get("name") == port]
        port = int(named[0]["containerPort"])
    return int((pod["metadata"].get("annotations") or {}).get(f"{PORTS}{port}", port))


class Services:
    """Listens at every port of every Service, in a thread, until `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turns = itertools.count()
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Listen where Services have come since the last call."""
        for service in self._store.all("Service"):
            address = service["spec"]["clusterIP"]
            for port in service["spec"].get("ports") or []:
                if address != "None" and (address, port["port"]) not in self._servers:
                    made = asyncio.run_coroutine_threadsafe(self._listen(service, port), self._loop)
                    self._servers[address, port["port"]] = made.result(10)

    async def _listen(self, service: Object, port: Object) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.CancelledError):  # the task ends here, cut or not
                await self._forward(service, port, reader, writer)
            writer.close()

        return await asyncio.start_server(serve, service["spec"]["clusterIP"], port["port"])

    async def _forward(
        self, service: Object, port: Object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pods = self._ready(service["metadata"]["namespace"], service["spec"]["selector"])
        if not pods:
            return
        pod = pods[next(self._turns) % len(pods)]
        target = port_of(pod, port.get("targetPort", port["port"]))
        there, back = await asyncio.open_connection(pod["status"]["podIP"], target)
        with contextlib.closing(back):
            ways = (_copy(reader, back), _copy(there, writer))
            await asyncio.gather(*ways, return_exceptions=True)

    def _ready(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        every = self._store.all("Pod", namespace)
        return [each for each in every if is_ready(each) and selector.items() <= each["metadata"]["labels"].items()]

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers.values():
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
