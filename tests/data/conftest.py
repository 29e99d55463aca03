"""What the tests of data share."""

import pytest


@pytest.fixture(scope="module")
def s3():
    """The proxy of an S3 server that holds `s3://corpus`."""
    from tests.data.s3 import serve_bucket

    with serve_bucket() as proxy:
        yield proxy
