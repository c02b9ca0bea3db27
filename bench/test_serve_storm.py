"""Tests of bench/serve-storm against a server of a few lines: what it counts as a fault, and what it does not."""

import asyncio
import contextlib
import unittest
import unittest.mock

from test_bench import script

storm = script("serve-storm")
OK = b"HTTP/1.1 200 OK\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n{}"


def against(answer, ask):
    """What `ask(address)` gets of a server that does `answer(reader, writer)`."""

    async def both():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        try:
            return await ask(server.sockets[0].getsockname())
        finally:
            server.close()

    return asyncio.run(both())


class Storm(unittest.TestCase):
    def test_a_crowd_asks_at_once_and_each_gets_what_it_gets(self):
        asked = []

        async def answer(reader, writer):
            # Nobody asks before all have connected.
            await reader.readuntil(b"\r\n\r\n")
            asked.append(writer)
            writer.write(OK if len(asked) <= 2 else BUSY)
            writer.close()

        with unittest.mock.patch.object(storm, "CONNECT_S", 0.05):
            replies = against(answer, lambda address: storm.crowd(address, 5))
        self.assertEqual(sorted((code, again) for code, again, _ in replies), [(200, False)] * 2 + [(429, True)] * 3)
        self.assertEqual(storm.crowd_faults(replies, 2), [])

    def test_what_a_crowd_may_not_get(self):
        right = [(200, False, 1.0)] * 2 + [(429, True, 0.1)]
        self.assertEqual(storm.crowd_faults(right, 2), [])
        self.assertEqual(storm.crowd_faults(right, 3), ["2 were answered, of 3 that could be"])
        self.assertEqual(storm.crowd_faults([*right, (0, False, 0.1)], 2), ["1 answers have status 0"])
        self.assertEqual(storm.crowd_faults([*right, (429, False, 0.1)], 2), ["a 429 says not when to come back"])
        self.assertEqual(storm.crowd_faults([*right, (429, True, 9.0)], 2), ["1 refusals took up to 9.0 s"])

    def test_a_connection_that_is_reset_has_no_status(self):
        async def answer(_, writer):
            writer.transport.abort()

        self.assertEqual(against(answer, lambda address: storm.ask(address, b"x"))[:2], (0, False))

    def test_slow_connections_are_timed_until_they_are_closed(self):
        async def closes(reader, writer):
            with contextlib.suppress(OSError):
                await reader.read(1)
                writer.close()

        async def waits(reader, _):
            with contextlib.suppress(OSError):
                await reader.read(-1)

        with unittest.mock.patch.object(storm, "LATE_S", 0):
            self.assertLess(against(closes, lambda address: storm.drip(address, b"GET", 1)), 1)
            self.assertIsNone(against(waits, lambda address: storm.drip(address, b"", 0.1)))

    def test_what_slow_connections_may_not_do(self):
        usual = [(200, 0.1)]
        self.assertEqual(storm.slow_faults([9.9, 30.0], usual, usual), [])
        self.assertEqual(storm.slow_faults([9.9, None], usual, usual), ["1 slow connections were not closed"])
        self.assertEqual(storm.slow_faults([9.9], usual, [(429, 0.1)]), ["the usual client was refused"])
        self.assertEqual(storm.slow_faults([9.9], usual, [(200, 5.0)]), ["the usual client waited 5.00 s"])

    def test_what_may_not_happen_at_the_end(self):
        whole, told = [(200, False, 3.0)] * 2, [(503, True, 0.1)]
        self.assertEqual(storm.stop_faults(whole, told, 0), [])
        broken = [*whole, (0, False, 1.0)]
        self.assertEqual(storm.stop_faults(broken, told, 0), ["1 of 3 got no answer when the server was told to stop"])
        self.assertEqual(storm.stop_faults(whole, [], 0), ["who came after SIGTERM was not told to go elsewhere"])
        self.assertEqual(storm.stop_faults(whole, told, 3), ["exit code 3 after SIGTERM"])


if __name__ == "__main__":
    unittest.main()
