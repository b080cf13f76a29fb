"""Takes all that is imported so far out of the garbage collector's sight. The fork server imports this last: each full
collection in a rank, of which DeepSpeed asks for several an engine, would else walk through half a million objects and
copy the pages that they share with the server."""

import gc

gc.collect()
gc.freeze()
