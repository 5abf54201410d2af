"""Load generator and measurements behind `camserve bench`.

`mix` prepares the requests and `schedule` their send times. `sender` sends them and records the outcomes. `stats`
summarises the records, and `knee` searches for the highest rate that meets a latency bound.
"""
