"""How figures are made: timing, counting, records, verdicts, the gate and its cases."""
