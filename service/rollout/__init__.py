"""The rollout engine: places releases on colours and decides which colour is live.

It runs on the host, needs nothing but the standard library, and shares only files and sockets with the model
containers and with nginx (docs/contracts.md).
"""
