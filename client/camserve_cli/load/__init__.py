"""Load for a server, and what becomes of it: `camserve bench`.

`mix` says what is asked and `schedule` when, `run` asks, `stats` and `knee` make figures of what was recorded.
"""
