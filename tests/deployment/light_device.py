"""A device's agent that keeps the light trainer: ``python light_device.py STATE DATA [share]``."""

import sys
from pathlib import Path

from fedia3.client.agent import Agent, AgentSettings, serve
from fedia3.client.device import DeviceFolder

state, data, *share = sys.argv[1:]
settings = AgentSettings(
    data=Path(data),
    share_personal=bool(share),
    trainer_program=(sys.executable, str(Path(__file__).with_name("light_trainer.py"))),
)
serve(Agent(settings, DeviceFolder(Path(state).absolute())))
