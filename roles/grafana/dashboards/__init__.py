"""Where the JSON files in roles/grafana/files/dashboards come from: one module for each dashboard.

`python3 -m roles.grafana.dashboards` writes the files anew; with `--check` it fails where they differ.
"""
