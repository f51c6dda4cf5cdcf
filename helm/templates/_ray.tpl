{{/* What the service must know of the Ray cluster. */}}

{{/* The RayCluster's name. */}}
{{- define "merger.ray.name" -}}
{{- printf "%s-ray" (include "merger.fullname" .) -}}
{{- end -}}

{{/* Where Ray's Jobs API is. */}}
{{- define "merger.ray.url" -}}
http://{{ include "merger.ray.name" . }}-head-svc:8265
{{- end -}}

{{/* The Secret whose key `auth_token` is Ray's token; nothing where Ray runs without. */}}
{{- define "merger.ray.tokenSecret" -}}
{{- end -}}

{{/* JSON of the nodes that the autoscaler may add; nothing without an autoscaler. */}}
{{- define "merger.ray.nodeShapes" -}}
{{- end -}}

{{/* NetworkPolicy: egress rules to Ray's Jobs API. */}}
{{- define "merger.ray.egress" -}}
- to:
    - podSelector:
        matchLabels:
          ray.io/cluster: {{ include "merger.ray.name" . }}
          ray.io/node-type: head
  ports:
    - port: 8265
      protocol: TCP
{{- end -}}
