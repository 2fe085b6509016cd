"""Pools as processes: a router in front of workers that prefill or decode, on one host or many.

    client -- OpenAI's API --> router
                                 | 1. POST /internal/prefill   prompt, parameters
                                 |    <- first token, drafts, kv_transfer_params (a ticket)
                                 | 2. POST /internal/decode    all that, to any decode worker
    prefill worker <-- pages, by ticket (kv/) -- decode worker
                                 |    <- tokens, line by line
    both <-- blocks --> cache servers (ems/)

All workers of a kind are equal: any request may go to any of them, and goes to the one with the least load.
The router keeps the prompt and every token that it has forwarded. If a worker loses a request, by dying or by
preempting it, the router sends prompt and tokens so far to another worker as a new prompt. With the policy
`fail` it returns an explicit error instead. The router notices that a worker died by its connections, and
that it hangs by missing status answers for some seconds. A client that leaves closes its connection, which
ends its request; pages that will not be fetched are withdrawn by the router, under the id that it assigned,
or freed at the end of their lease.

`messages.py` has the JSON messages, `worker.py` a worker's routes, `peer.py` the client of a worker,
`members.py` the choice of a worker, `dispatch.py` the course of one request, `router.py` the service over all
that. Every message needs the secret that all processes share.
"""
