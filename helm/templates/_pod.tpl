{{/*
What the pods of the service's own components share: (dict "root" $ "component" "api" "values" .Values.api).
Knows nothing of what their containers run. Ray's pods are made elsewhere.
*/}}

{{- define "merger.podMetadata" -}}
labels:
  {{- include "merger.podLabels" . | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Without the chart's version: a new one alone would replace every pod. */}}
{{- define "merger.podLabels" -}}
app.kubernetes.io/part-of: merger
{{ include "merger.selectorLabels" . }}
{{- with merge (dict) .root.Values.commonLabels (default dict .values.podLabels) }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Service links are off: the variables of a Service named `merger-...` would be read as settings. */}}
{{- define "merger.podSettings" -}}
serviceAccountName: {{ include "merger.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "merger.podSecurity" . | nindent 2 }}
{{- include "merger.pullSecrets" .root }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- with .values.extraInitContainers }}
initContainers:
  {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "merger.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Replicas go to different nodes where that can be, unless the values say otherwise. */}}
{{- define "merger.spread" -}}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
  {{- tpl (toYaml .values.topologySpreadConstraints) .root | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "merger.selectorLabels" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* The name of a component's ServiceAccount, which the chart makes unless one is named. */}}
{{- define "merger.serviceAccount" -}}
{{- default (printf "%s-%s" (include "merger.fullname" .root) .component) .values.serviceAccount.name -}}
{{- end -}}

{{- define "merger.serviceAccountObject" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "merger.serviceAccount" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "merger.labels" . | nindent 4 }}
  {{- with mergeOverwrite (deepCopy .values.serviceAccount.annotations) (default dict .annotations) }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}

{{/* The image, where it may write, and what else is the same in each of our containers. */}}
{{- define "merger.container" -}}
image: {{ include "merger.image" (dict "root" .root "image" .root.Values.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "merger.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .values.resources | nindent 2 }}
{{- end -}}

{{/* Variables of the values go last: they may replace what the chart says. */}}
{{- define "merger.extraEnv" -}}
- name: HOME
  value: /home/merger
{{- if and .root.Values.monitoring.telemetry.enabled (has .component (list "api" "dispatcher")) }}
{{ include "merger.telemetryEnv" . }}
{{- end }}
{{- with .values.extraEnv }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{/* What FastAPI and OpenTelemetry's libraries read. */}}
{{- define "merger.telemetryEnv" -}}
- name: FASTAPI_OTEL_AUTO_CONFIGURE
  value: "true"
- name: OTEL_SERVICE_NAME
  value: {{ include "merger.fullname" .root }}-{{ .component }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .root.Values.monitoring.telemetry.endpoint | quote }}
{{- range $name, $value := .root.Values.monitoring.telemetry.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* The settings, then what storage and the values add. */}}
{{- define "merger.serviceEnvFrom" -}}
{{ include "merger.settingsEnvFrom" .root }}
{{- with include "merger.storage.envFrom" .root }}
{{ . }}
{{- end }}
{{- with .values.extraEnvFrom }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{- define "merger.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/merger
{{- with .values.extraVolumeMounts }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{- define "merger.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .values.tmpSize }}
- name: home
  emptyDir:
    sizeLimit: {{ .values.homeSize }}
{{- with .values.extraVolumes }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{/* A container's three probes: (dict "port" "http" "seconds" 120), the seconds for its start. */}}
{{- define "merger.probes" -}}
startupProbe:
  httpGet:
    path: /livez
    port: {{ .port }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div (int .seconds) 2 }}
livenessProbe:
  httpGet:
    path: /livez
    port: {{ .port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet:
    path: /readyz
    port: {{ .port }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/* At most one pod of a component at a time leaves by a drain; a single one may leave too, or a drain would wait for ever. */}}
{{- define "merger.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "merger.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "merger.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "merger.selectorLabels" . | nindent 6 }}
{{- end -}}
