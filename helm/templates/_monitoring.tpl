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

{{/* A pattern of the release's volume claims. */}}
{{- define "merger.monitoring.claims" -}}
{{ include "merger.fullname" . }}(-.*)?
{{- end -}}

{{/* Sentences on what is wrong with the values, as in _validation.tpl. */}}
{{- define "merger.wrong.monitoring" -}}
{{- with .Values.monitoring }}
{{- if and (or .serviceMonitor.enabled .podMonitor.enabled .prometheusRule.enabled) (not ($.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/ServiceMonitor")) }}
- "The cluster does not know ServiceMonitor, PodMonitor and PrometheusRule: install the Prometheus operator, or set monitoring.*.enabled to false. For helm template give --api-versions monitoring.coreos.com/v1/ServiceMonitor."
{{- end }}
{{- end }}
{{- end -}}
