"""A web page that shows what a running machine does (``--dashboard``): a process of its own beside the VMM's.

::

    VMM: monitor thread --- socketpair: QMP, some commands only --- feed --- hub --- server-sent events --- browsers
                                                                  (thread)  (newest state wins)

The VMM answers one client that asks twice a second while somebody looks, and never waits for it; browsers are this
process's business. It ends when the socketpair does, and its death costs the VMM a line in its trace.
"""
