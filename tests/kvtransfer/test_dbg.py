import asyncio
from tests.kvtransfer.test_agent import *
async def test_x(pair):
    source, destination = pair
    t=asyncio.create_task(destination.agent.close())
    await asyncio.sleep(2)
    for k in asyncio.all_tasks(): k.print_stack()
    assert t.done()
