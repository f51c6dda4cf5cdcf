{{/* What the objects of monitoring share. Knows nothing of what is measured: that stands in files/. */}}

{{/* Labels with those by which a Prometheus finds its objects: (dict "root" $ "labels" map). */}}
{{- define "merger.monitoring.labels" -}}
{{- merge (dict) .labels (include "merger.labels" (dict "root" .root "component" "monitoring") | fromYaml) | toYaml -}}
{{- end -}}

{{/* How often and how long it scrapes: the values of a monitor. */}}
{{- define "merger.monitoring.scrape" -}}
interval: {{ .interval }}
scrapeTimeout: {{ .scrapeTimeout }}
{{- end -}}

{{/* A pattern of the volume claims that the release uses: its own, and those that are named to it. */}}
{{- define "merger.monitoring.claims" -}}
{{- $storage := default dict .Values.storage -}}
{{- $named := list (dig "volume" "existingClaim" "" $storage) (dig "modelCache" "existingClaim" "" $storage) | compact -}}
{{- join "|" (prepend $named (printf "(data-)?%s(-.*)?" (include "merger.fullname" .))) -}}
{{- end -}}

{{/* Whether Ray's pods are the chart's: "yes", or nothing where the cluster is somebody else's. */}}
{{- define "merger.monitoring.ownRay" -}}
{{- if not (dig "external" "url" "" (default dict .Values.ray)) }}yes{{ end -}}
{{- end -}}

{{/* Sentences on what is wrong with the values, as in _validation.tpl. */}}
{{- define "merger.wrong.monitoring" -}}
{{- with .Values.monitoring }}
{{- if and .telemetry.enabled (not .telemetry.endpoint) }}
- "monitoring.telemetry.enabled needs monitoring.telemetry.endpoint: where the collector is."
{{- end }}
{{- if and (or .serviceMonitor.enabled .podMonitor.enabled .prometheusRule.enabled) (not ($.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/ServiceMonitor")) }}
- "The cluster does not know ServiceMonitor, PodMonitor and PrometheusRule: install the Prometheus operator, or set monitoring.*.enabled to false. For helm template give --api-versions monitoring.coreos.com/v1/ServiceMonitor."
{{- end }}
{{- end }}
{{- end -}}
