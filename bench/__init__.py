"""What a start and everything else people wait for costs, side by side with what they would do without ovm.

``.venv/bin/python -m bench`` measures; docs/numbers.md says from where to where. The modules, from the bottom up::

    samples  result  goals             numbers, what is wanted of them
    host  opponents  programs          this machine, and what ovm is compared with
    disks  starts  running  idle  commands
    plan                               which of those, in what order, in what time
    report  comparison  picture        what people see of it
"""
