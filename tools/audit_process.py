"""Prints what tools.audit compares between processes, as JSON."""
import json
import sys

from base.command_line import parse_options
from base.errors import exit_on_bad_input


@exit_on_bad_input("tools.audit_process")
def main():
    from tools.audit import AuditOptions, subjects
    from tools.audit_around import fingerprint
    options, *_ = parse_options(AuditOptions, sys.argv[1:], __doc__, with_config_file=False)
    [subject] = subjects(options)
    print(json.dumps(fingerprint(subject)))


if __name__ == "__main__":
    main()
