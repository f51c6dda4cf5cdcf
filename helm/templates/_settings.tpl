{{/* Where the service's settings come from: MERGER_ variables of a ConfigMap, and those that are secret. Knows nothing of pods. */}}

{{/* A value as text. Numbers of values files are floating: 1073741824 would print as 1.073741824e+09. */}}
{{- define "merger.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- printf "%.0f" . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* The ConfigMap's data: what the chart knows itself, then `settings`. */}}
{{- define "merger.settings" -}}
MERGER_URL: {{ include "merger.apiUrl" . | quote }}
MERGER_RAY_URL: {{ include "merger.ray.url" . | quote }}
{{- with include "merger.ray.nodeShapes" . }}
MERGER_NODE_SHAPES: {{ . | quote }}
{{- end }}
{{- range $name, $value := .Values.settings }}
MERGER_{{ upper $name }}: {{ include "merger.text" $value | quote }}
{{- end }}
{{- end -}}

{{- define "merger.serviceUrl" -}}
{{- printf "http://%s-api:%d" (include "merger.fullname" .) (int .Values.service.port) -}}
{{- end -}}

{{/* Where runners reach the API. */}}
{{- define "merger.apiUrl" -}}
{{- default (include "merger.serviceUrl" .) .Values.api.url -}}
{{- end -}}

{{- define "merger.settingsEnvFrom" -}}
- configMapRef:
    name: {{ include "merger.fullname" . }}-settings
{{- end -}}

{{/* The variables that are no plain text of the ConfigMap: secrets, and what follows from the storage. */}}
{{- define "merger.settingsEnv" -}}
{{ include "merger.databaseEnv" . }}
{{ include "merger.apiKeyEnv" . }}
- name: MERGER_SECRET_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ default (printf "%s-keys" (include "merger.fullname" .)) .Values.auth.secretKeys.existingSecret }}
      key: {{ .Values.auth.secretKeys.key }}
{{- with include "merger.ray.tokenSecret" . }}
- name: MERGER_RAY_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: auth_token
{{- end }}
{{- with include "merger.storage.env" . }}
{{ . }}
{{- end }}
{{- end -}}

{{- define "merger.databaseEnv" -}}
- name: MERGER_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ default (printf "%s-database" (include "merger.fullname" .)) .Values.database.existingSecret }}
      key: {{ .Values.database.key }}
{{- end -}}

{{- define "merger.apiKeyEnv" -}}
- name: MERGER_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "merger.apiKeySecret" . }}
      key: {{ .Values.auth.apiKey.key }}
{{- end -}}

{{- define "merger.apiKeySecret" -}}
{{- default (printf "%s-keys" (include "merger.fullname" .)) .Values.auth.apiKey.existingSecret -}}
{{- end -}}

{{/*
What a Secret of the release holds under a key, encoded, or else the text given:
(dict "root" $ "secret" "name" "key" "api-key" "otherwise" "text"). `helm template` cannot look up, and so makes new ones each time.
*/}}
{{- define "merger.kept" -}}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace .secret | default dict -}}
{{- dig "data" .key (b64enc .otherwise) $secret -}}
{{- end -}}
