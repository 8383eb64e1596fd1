import sys

from benchmarks.harness.commands import main

sys.exit(main())
