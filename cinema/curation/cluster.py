"""The same jobs as in `pool`, spread over a Ray cluster by Ray Data: `pip install "cinema[ray]"`.

Every machine of the cluster must reach the films and the folder of results: a shared disk, or an address such as
``s3://bucket/films``. A job still runs in a child process of its worker, so what is said of `pool` holds here.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cinema.curation.pool import Ask, run_jobs
from cinema.curation.store import StoppedError
from cinema.errors import UserError


def run_on_ray(
    function: Callable[[Any, Ask], Any], jobs: Sequence[Any], *, limit_s: float = 900.0, **_: Any
) -> Iterator[tuple[int, Any]]:
    """As `pool.run_jobs`, one core of the cluster per job; its other settings mean nothing here.

    Raises:
        UserError: ray is not installed.
        StoppedError: a job raised it.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("ray is not installed; run `pip install 'cinema[ray]'`, or leave --ray away") from None
    rows = [{"number": number, "job": pickle.dumps((function, job, limit_s))} for number, job in enumerate(jobs)]
    if not rows:
        return
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_attend, num_cpus=1)
    for row in done.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, StoppedError):
            raise result
        yield row["number"], result


def _attend(row: dict[str, Any]) -> dict[str, Any]:
    """Do one job in a child of this worker."""
    function, job, limit_s = pickle.loads(row["job"])
    try:
        _, result = next(iter(run_jobs(function, [job], limit_s=limit_s)))
    except StoppedError as error:
        result = error
    return {"number": row["number"], "result": pickle.dumps(result)}
